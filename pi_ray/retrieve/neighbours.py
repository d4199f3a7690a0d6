"""Neighbours: the training rows that serve as examples of a row, paper equation 3.

x_i^egs = the (x_j, y_j), j != i, with the k highest s(y_i, y_j): FAISS proposes candidates, exact BLEU ranks them. A training row is
compared by its answer. A dev or test row is compared by its query, because at inference nobody knows its answer.
Never given: the row itself, or a row with the same query, which would hand over the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Literal

import numpy as np

from pi_ray.config import RetrieveConfig
from pi_ray.protocols import Row
from pi_ray.retrieve.bleu import BleuIndex
from pi_ray.retrieve.candidates import Candidates

Side = Literal["answer", "query"]


def normalised(query: str) -> str:
    """Queries that differ in case or white space only are the same query."""
    return " ".join(query.casefold().split())


@dataclass(frozen=True)
class Found:
    """Bank ids, best first, and their BLEU scores (0 to 100)."""

    ids: list[str]
    scores: list[float]


def part(rows: Sequence[Row], fraction: float) -> list[Row]:
    """The bank that holds this share of the rows (paper 5.5): those whose ids hash lowest, so that a larger share holds a smaller one."""
    count = max(1, round(len(rows) * fraction))
    return nsmallest(count, rows, key=lambda r: hashlib.sha256(r.id.encode()).digest()) if count < len(rows) else list(rows)


class Bank:
    """Training rows, indexed by one side."""

    def __init__(self, rows: Sequence[Row], config: RetrieveConfig, by: Side = "answer"):
        from pi_ray.registry import encoders

        self.rows = sorted(rows, key=lambda r: r.id)  # position follows id, so that a tie goes to the smaller id
        self.by = by
        self.config = config
        texts = [getattr(r, by) for r in self.rows]
        self.bleu = BleuIndex(texts)
        self.candidates = Candidates(encoders[config.encoder](config), texts)
        self.queries = np.array([normalised(r.query) for r in self.rows], dtype=object)
        self.ids = np.array([r.id for r in self.rows], dtype=object)

    def find(self, rows: Sequence[Row], k: int) -> list[Found]:
        """For each row its k best examples; fewer only when the bank has no more to give."""
        found: list[Found | None] = [None] * len(rows)
        todo = list(range(len(rows)))
        count = max(self.config.candidates, k)
        while todo:
            texts = [getattr(rows[i], self.by) for i in todo]
            near = self.candidates.nearest(texts, count)
            scores = np.round(self.bleu.scores(texts, near), 4)
            for i, positions, values in zip(todo, near, scores, strict=True):
                found[i] = self._best(rows[i], positions, values, k)
            todo = [i for i in todo if len(found[i].ids) < k] if near.shape[1] < len(self.rows) else []
            count *= 4  # the excluded ones took too many places
        return found

    def _best(self, row: Row, positions: np.ndarray, scores: np.ndarray, k: int) -> Found:
        allowed = (self.ids[positions] != row.id) & (self.queries[positions] != normalised(row.query))
        positions, scores = positions[allowed], scores[allowed]
        order = np.lexsort((positions, -scores))[:k]
        return Found(self.ids[positions[order]].tolist(), scores[order].tolist())


def find(rows: Sequence[Row], bank: Sequence[Row], k: int, config: RetrieveConfig, by: Side = "answer") -> list[Found]:
    """The k best examples of each row among `bank` (training rows only; the caller sees to that)."""
    return Bank(bank, config, by).find(rows, k) if bank and k else [Found([], []) for _ in rows]
