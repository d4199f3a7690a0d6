"""Exact match: the output is the answer, up to runs of white space."""

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.protocols import Row


def exact_match(output: str, answer: str) -> float:
    """1.0 when both are equal up to runs of white space, else 0.0."""
    return float(output.split() == answer.split())


class ExactMatch:
    """1 for the answer, else 0."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        pass

    def score(self, row: Row, output: str) -> float:
        return exact_match(output, row.answer)
