"""Selective Context (Li et al. 2023, arXiv 2310.06201): drop the phrases with the least self-information.

A phrase's self-information is the mean of -log p over its tokens, as in the authors' code. Their phrases are the noun
chunks of a parser; here a phrase is a group of words between punctuation, line breaks and the small words that open a
new group, so that no parser is needed.
"""

import re

from pi_ray.compress import words
from pi_ray.compress.ranking import Ranking, RankingCompressor, SurprisalModel
from pi_ray.config import CompressConfig

LONGEST = 5  # words of a phrase
OPENERS = re.compile(
    "a|an|the|this|that|these|those|my|your|his|her|its|our|their|any|some|each|every|all|no"
    "|of|in|on|at|by|for|with|from|to|into|over|under|about|between|through|before|after|within|without|as|per"
    "|and|or|but|nor|so|if|then|else|when|while|where|which|who|whose|what|how|why|because|than|not"
    "|is|are|was|were|be|been|has|have|had|do|does|did|can|could|may|might|must|shall|should|will|would"
    "|i|you|he|she|it|we|they|there|here|please",
    re.I,
)


class SelectiveContext(RankingCompressor):
    """Compressor "selective"."""

    def __init__(self, config: CompressConfig):
        super().__init__()
        self.model = SurprisalModel(config)

    def rank(self, text: str) -> Ranking:
        return Ranking.from_tokens(split_phrases(text), *self.model.surprisal(text))


def split_phrases(text: str) -> list[words.Span]:
    """The words of `text` in groups of at most LONGEST, as spans."""
    found: list[words.Span] = []
    length, only_openers, closed = 0, False, True  # of the last phrase; `closed`: the next word begins a new one
    for start, end in words.word_spans(text):
        word = text[start:end]
        is_opener = OPENERS.fullmatch(word) is not None
        if (
            closed or length == LONGEST or "\n" in text[found[-1][1] : start] or word[0] in "([{"
            or (is_opener and not only_openers)
        ):
            found.append((start, end))
            length, only_openers = 1, is_opener
        else:
            found[-1] = (found[-1][0], end)
            length, only_openers = length + 1, only_openers and is_opener
        closed = word[-1] in ".,;:!?)]}"
    return found
