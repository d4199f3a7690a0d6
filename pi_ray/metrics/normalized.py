"""Normalised match: equal but for case, punctuation, articles and white space, as SQuAD's evaluation has it.

Unlike SQuAD's, a decimal point and a minus sign stay, so that 3.5 is not 35 and -2 is not 2, punctuation is that of all
scripts, and letters are compared by Unicode's compatibility form (NFKC).
"""

import unicodedata

import regex

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.metrics.exact_match import exact_match
from pi_ray.protocols import Row

ARTICLES = regex.compile(r"\b(a|an|the)\b")
PUNCTUATION = regex.compile(r"(?!(?<=\d)\.(?=\d))(?!-(?=\d))[\p{P}$+<=>^`|~]")


def normalize(text: str) -> str:
    """Words in small letters with one space between them; "" for text of punctuation or articles alone."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    return " ".join(ARTICLES.sub(" ", PUNCTUATION.sub("", text)).split())


class Normalized:
    """An answer that normalises to nothing, such as "?!", is compared as it is."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        pass

    def score(self, row: Row, output: str) -> float:
        answer = normalize(row.answer)
        return float(normalize(output) == answer) if answer else exact_match(output, row.answer)
