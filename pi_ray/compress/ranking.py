"""Base of compressors that score the pieces of a text once and then keep the best of them at any rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from pi_ray.compress import words

CACHED_TEXTS = 64  # rankings kept; an actor may see any number of texts


@dataclass(frozen=True)
class Ranking:
    """Pieces of a text, separated by white space, with their scores and their sizes in the scorer's tokens."""

    pieces: Sequence[words.Span]
    scores: Sequence[float]
    sizes: Sequence[int]

    @classmethod
    def from_tokens(cls, pieces: Sequence[words.Span], offsets: Sequence[words.Span], scores: torch.Tensor) -> Ranking:
        """Score each piece by the mean `scores` of its tokens, shape (tokens,); `offsets` are the tokens' spans."""
        tokens = words.tokens_by_span(pieces, offsets)
        return cls(pieces, [float(scores[t].mean()) if t else 0.0 for t in tokens], [len(t) for t in tokens])


class RankingCompressor:
    """Ranks each text once, since a text is compressed at many rates. Subclasses implement `rank`."""

    def __init__(self) -> None:
        self.ranking = lru_cache(CACHED_TEXTS)(self.rank)

    def rank(self, text: str) -> Ranking:
        raise NotImplementedError

    def compress(self, text: str, rate: float) -> str:
        ranking = self.ranking(text)
        return words.join_words(text, ranking.pieces, keep_best(ranking.scores, ranking.sizes, rate))


def keep_best(scores: Sequence[float], sizes: Sequence[int], rate: float) -> list[bool]:
    """Which pieces stay, by falling score, for sizes that come closest to `rate` of all; of equals the earlier."""
    kept, used, goal = [False] * len(scores), 0, rate * sum(sizes)
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if used + sizes[i] / 2 > goal:
            break
        kept[i] = True
        used += sizes[i]
    return kept
