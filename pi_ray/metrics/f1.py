"""F1 of words, as SQuAD's evaluation has it: the words that output and answer share, each as often as both have it."""

from collections import Counter

import regex

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.metrics.normalized import normalize
from pi_ray.protocols import Row

# Chinese and Japanese characters count one by one, since no spaces part their words.
WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[^\s\p{Han}\p{Hiragana}\p{Katakana}]+")


def split_words(text: str) -> list[str]:
    """The normalised words of a text."""
    return WORD.findall(normalize(text))


class WordF1:
    """The F1 of the words of output and answer; 1 where both have none."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        pass

    def score(self, row: Row, output: str) -> float:
        found, wanted = Counter(split_words(output)), Counter(split_words(row.answer))
        if not (found and wanted):
            return float(found == wanted)
        shared = (found & wanted).total()
        return 2 * shared / (found.total() + wanted.total())
