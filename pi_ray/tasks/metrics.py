"""Metrics of single answers that tasks share. BLEU over all rows, intervals and tests stand in evaluate/statistics.py."""

from __future__ import annotations


def exact_match(output: str, answer: str) -> float:
    """1.0 when both are equal up to runs of whitespace, else 0.0."""
    return float(output.split() == answer.split())
