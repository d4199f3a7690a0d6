"""ROUGE-L: F1 of the longest common subsequence of words (Lin, 2004).

Words are letters and digits of any script in small letters, without stemming; rouge-score's are a to z alone. Chinese
and Japanese characters count one by one, since no spaces part their words.
"""

import regex

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.protocols import Row

CHARACTER = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
WORD = regex.compile(rf"{CHARACTER}|[[\p{{L}}\p{{M}}\p{{N}}]--{CHARACTER}]+", regex.V1)


def subsequence_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by bits (Hyyro, 2004): Python's integers hold a row of the table."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = whole = (1 << len(a)) - 1
    for word in b:
        same = row & places.get(word, 0)
        row = ((row + same) | (row - same)) & whole
    return len(a) - row.bit_count()


class RougeL:
    """The F1 of the longest common subsequence; where a text has no words, 1 for the answer as it is, else 0."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        pass

    def score(self, row: Row, output: str) -> float:
        found, wanted = WORD.findall(output.lower()), WORD.findall(row.answer.lower())
        if not (found and wanted):
            return float(output.split() == row.answer.split())
        return 2 * subsequence_length(wanted, found) / (len(found) + len(wanted))
