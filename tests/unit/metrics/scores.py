"""Scores of single outputs by the metrics of a run file, for the tests of each metric."""

from __future__ import annotations

from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.metrics import RowScorer
from pi_ray.protocols import Row

EMOJI, COMBINING, HINDI = "\U0001f44d", "cafe\u0301", "\u0915\u093f"


def score(metric: Any, answer: str, *outputs: str) -> list[float]:
    """The first number of each output, rounded to three places."""
    scorer = RowScorer(TaskConfig(metric=metric))
    row = Row("row-1", "a query", answer)
    assert scorer.check(row) == ""
    return [round(next(iter(scorer.score(row, output).values())), 3) for output in outputs]


def check(metric: Any, answer: str) -> str:
    """Why the metric cannot score outputs against an answer."""
    return RowScorer(TaskConfig(metric=metric)).check(Row("row-1", "a query", answer))
