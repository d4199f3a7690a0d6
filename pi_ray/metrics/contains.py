"""Containment: the answer stands somewhere in the output, both normalised."""

import re

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.metrics.normalized import normalize
from pi_ray.protocols import Row

APART = r"[0-9a-z]"  # a letter or digit that goes on beside the answer makes another word of it


class Contains:
    """An answer that normalises to nothing must stand in the output as it is."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        pass

    def score(self, row: Row, output: str) -> float:
        answer = normalize(row.answer)
        if not answer:
            return float(row.answer.strip() in output)
        return float(bool(re.search(f"(?<!{APART}){re.escape(answer)}(?!{APART})", normalize(output))))
