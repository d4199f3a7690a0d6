"""Evaluation on held-out rows: columns (ways of answering), their answers and seconds, scores with intervals, what was forgotten and what leaks."""
