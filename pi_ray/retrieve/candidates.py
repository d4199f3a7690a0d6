"""Candidates: the bank texts whose vectors are nearest to a query's, from FAISS. What is best among them, BLEU decides."""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np

from pi_ray.protocols import Encoder


class Candidates:
    """An exact inner-product index over the bank. Flat, because up to about a million rows a scan takes milliseconds a query."""

    def __init__(self, encoder: Encoder, bank: Sequence[str]):
        self.encoder = encoder
        vectors = encoder.encode(bank)
        self.index = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(np.ascontiguousarray(vectors))

    def nearest(self, texts: Sequence[str], count: int) -> np.ndarray:
        """Bank positions of the `count` nearest texts, shape (len(texts), min(count, bank)), nearest first."""
        vectors = np.ascontiguousarray(self.encoder.encode(texts))
        return self.index.search(vectors, min(count, self.index.ntotal))[1]
