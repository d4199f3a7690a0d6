"""Compressors that score the pieces of a text once and keep the best of them, whatever the rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pi_ray.compress import words

CACHED_TEXTS = 64  # texts: an actor may see any number


@dataclass(frozen=True)
class Ranking:
    """The pieces of a text (characters, separated by white space), their scores, and their sizes in the scorer's tokens."""

    pieces: Sequence[words.Span]
    scores: Sequence[float]
    sizes: Sequence[float]


class RankingCompressor:
    """What such compressors share: a text is ranked once, since it is asked for at many rates."""

    def __init__(self) -> None:
        self.ranking = lru_cache(CACHED_TEXTS)(self.rank)

    def rank(self, text: str) -> Ranking:
        raise NotImplementedError

    def compress(self, text: str, rate: float) -> str:
        found = self.ranking(text)
        return words.join_words(text, found.pieces, keep_best(found.scores, found.sizes, rate))


def keep_best(scores: Sequence[float], sizes: Sequence[float], rate: float) -> list[bool]:
    """Which pieces stay so that their sizes come closest to `rate` of the whole: by falling score, of equals the earlier."""
    kept, used, goal = [False] * len(scores), 0.0, rate * sum(sizes)
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if used + sizes[i] / 2 > goal:
            break
        kept[i] = True
        used += sizes[i]
    return kept
