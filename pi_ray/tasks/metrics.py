"""Metrics of single answers that tasks share; metrics over all rows stand in evaluate/."""

from __future__ import annotations


def exact_match(output: str, answer: str) -> float:
    """1.0 when both are equal up to runs of white space, else 0.0."""
    return float(output.split() == answer.split())
