"""Containment: the answer stands somewhere in the output, both normalised."""

import regex

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.metrics.normalized import normalize
from pi_ray.protocols import Row

# A letter, digit or sign beside the answer makes another word or number of it: 5 is not 3.5, 5.9 or -5.
LETTER = r"[\p{L}\p{M}\p{N}--[\p{Han}\p{Hiragana}\p{Katakana}]]"
BEFORE, BEHIND = rf"(?<!{LETTER}|\d\.|(?<!\d)-)", rf"(?!{LETTER}|\.\d)"


class Contains:
    """An answer that normalises to nothing must stand in the output as it is."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        pass

    def score(self, row: Row, output: str) -> float:
        answer = normalize(row.answer)
        if not answer:
            return float(row.answer.strip() in output)
        return float(bool(regex.search(f"{BEFORE}{regex.escape(answer)}{BEHIND}", normalize(output), regex.V1)))
