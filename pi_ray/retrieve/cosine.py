"""Cosine of embeddings as a score, 0 to 100 (below 0 counts as 0), by the encoder that retrieve.encoder names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pi_ray.protocols import Encoder

PAIRS = 4_000_000  # pairs scored at once: bounds memory


class CosineIndex:
    """As BleuIndex, with another score."""

    def __init__(self, encoder: Encoder, bank: Sequence[str], groups: np.ndarray | None = None):
        self.encoder = encoder
        self.vectors = encoder.encode(bank)
        self.groups = np.full(len(bank), -1, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.groups)

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        """Cosines of bank texts and each reference, shape (q, c) as `candidates`, or (q, bank)."""
        asked = self.encoder.encode(references)
        if candidates is None:
            cosines = asked @ self.vectors.T
        else:
            cosines = np.stack([self.vectors[near] @ one for near, one in zip(candidates, asked, strict=True)])
        return 100.0 * np.maximum(cosines, 0.0).astype(np.float64)

    def top(
        self, references: Sequence[str], k: int, groups: np.ndarray | None = None, among: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact k best bank positions and their scores, as BleuIndex.top."""
        k, step = min(k, len(self)), max(1, PAIRS // max(len(self), 1))
        ids, best = np.full((len(references), k), -1, dtype=np.int64), np.full((len(references), k), -1.0)
        for begin in range(0, len(references), step):
            asked = references[begin : begin + step]
            every = np.broadcast_to(np.arange(len(self)), (len(asked), len(self)))
            near = every if among is None else np.sort(among[begin : begin + step], axis=1)
            found = self.scores(asked, None if among is None else np.maximum(near, 0))
            found[near < 0] = -1.0
            if groups is not None:
                found[np.asarray(groups)[begin : begin + step, None] == self.groups[near]] = -1.0
            order = np.argsort(-found, axis=1, kind="stable")[:, :k]
            some = slice(begin, begin + step), slice(order.shape[1])
            best[some] = np.take_along_axis(found, order, axis=1)
            ids[some] = np.where(best[some] < 0, -1, np.take_along_axis(near, order, axis=1))
        return ids, best
