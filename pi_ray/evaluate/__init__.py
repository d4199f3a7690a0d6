"""Evaluation on the held-out test rows: a trained run enters, eval/summary.json leaves.

evaluate.py asks each column (columns.py) through an answerer, scores the answers, and measures tokens and seconds.
"""
