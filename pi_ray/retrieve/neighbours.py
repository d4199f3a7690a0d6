"""Neighbours: the training rows that serve as examples of a row, paper equation 3.

x_i^egs = the (x_j, y_j), j != i, with the k highest s(y_i, y_j). A training row is compared by its answer. A dev or test row is compared by
its query, because at inference nobody knows its answer. In a bank of up to EXACT_ROWS every pair is scored; in a larger one those that FAISS
proposes. Never given: the row itself, or a row with the same query, which would hand over the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any, Literal

import numpy as np

from pi_ray.config import RetrieveConfig
from pi_ray.protocols import Row
from pi_ray.retrieve.candidates import Candidates

EXACT_ROWS = 100_000  # two cores find the ten best of so many answers in two thirds of a minute, FAISS in a fourteenth of that (tests/bench/retrieval.py)
NOBODY = -2  # the group of a row whose query the bank does not have

Side = Literal["answer", "query"]


def normalised(query: str) -> str:
    """Queries that differ in case or white space only are the same query."""
    return " ".join(query.casefold().split())


@dataclass(frozen=True)
class Found:
    """Bank ids, best first, and their scores (0 to 100)."""

    ids: list[str]
    scores: list[float]


def part(ids: Sequence[str], fraction: float) -> set[str]:
    """The bank that holds this share of the rows (paper 5.5): those whose ids hash lowest, so that a larger share holds a smaller one."""
    return set(nsmallest(max(1, round(len(ids) * fraction)), ids, key=lambda i: hashlib.sha256(i.encode()).digest())) if fraction < 1 else set(ids)


def is_exact(config: RetrieveConfig, rows: int) -> bool:
    """Whether every pair is scored in a bank of so many rows."""
    return config.method == "exact" or (config.method == "auto" and rows <= EXACT_ROWS)


class Bank:
    """Training rows, indexed by one side."""

    def __init__(self, rows: Iterable[Row], config: RetrieveConfig, by: Side = "answer", threads: int = 1):
        from pi_ray.registry import encoders

        entries = sorted((r.id, getattr(r, by), normalised(r.query)) for r in rows)  # position follows id, so that a tie goes to the smaller id
        self.ids = [i for i, _, _ in entries]
        texts = [text for _, text, _ in entries]
        self.texts = texts if config.diversity else []
        self.groups: dict[str, int] = {}
        groups = np.array([self.groups.setdefault(query, len(self.groups)) for *_, query in entries], dtype=np.int64)
        self.by, self.config = by, config
        self.is_exact = is_exact(config, len(entries))
        own = config.score == "bleu" and config.encoder == "ngram"  # BLEU's index has counted the n-grams already
        encoder = None if own or (self.is_exact and config.score != "embedding") else encoders[config.encoder](config)
        self.index = _index(config.score, texts, groups, encoder, threads)
        self.candidates = None if self.is_exact else Candidates(encoder or self.index, texts)

    def find(self, rows: Sequence[Row], k: int, exact: bool | None = None) -> list[Found]:
        """For each row its k best examples; fewer only when the bank has no more to give, or none that differ enough (retrieve.diversity)."""
        exact = self.is_exact if exact is None else exact
        found: list[Found | None] = [None] * len(rows)
        todo = list(range(len(rows)))
        count = max(self.config.candidates, k) if self.config.diversity or not exact else k
        while todo:
            asked = [rows[i] for i in todo]
            positions, scores = self._ranked(asked, count if self.config.diversity else k, None if exact else count)
            for i, near, values in zip(todo, positions, scores, strict=True):
                found[i] = self._choose(near[near >= 0], values[near >= 0], k)
            todo = [i for i in todo if len(found[i].ids) < k] if count < len(self.ids) else []
            count *= 4  # those left out took too many places
        return found

    def _own(self, rows: Sequence[Row]) -> np.ndarray:
        return np.array([self.groups.get(normalised(r.query), NOBODY) for r in rows], dtype=np.int64)

    def _ranked(self, rows: Sequence[Row], most: int, proposed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of the best, at most so many: of those that FAISS proposes, or (None) of the whole bank."""
        texts = [getattr(r, self.by) for r in rows]
        return self.index.top(texts, most, self._own(rows), None if proposed is None else self.candidates.nearest(texts, proposed))

    def _choose(self, positions: np.ndarray, scores: np.ndarray, k: int) -> Found:
        """The first k, or of them those that are not too near to a better one."""
        chosen, open_ = [], np.ones(len(positions), dtype=bool)
        for place in range(len(positions)):
            if len(chosen) == k:
                break
            if not open_[place]:
                continue
            chosen.append(place)
            if self.config.diversity:
                alike = self.index.scores([self.texts[positions[place]]], positions[None])[0]
                open_ &= alike <= 100.0 * (1.0 - self.config.diversity)
        return Found([self.ids[positions[p]] for p in chosen], [round(float(scores[p]), 4) for p in chosen])


def _index(score: str, texts: list[str], groups: np.ndarray, encoder: Any, threads: int) -> Any:
    """The index that knows `score`: `scores` of pairs and the exact `top`."""
    if score == "bleu":
        from pi_ray.retrieve.bleu import BleuIndex

        return BleuIndex(texts, groups, threads)
    if score == "rouge-l":
        from pi_ray.retrieve.rouge import RougeIndex

        return RougeIndex(texts, groups, threads)
    from pi_ray.retrieve.cosine import CosineIndex

    return CosineIndex(encoder, texts, groups)


def find(rows: Sequence[Row], bank: Sequence[Row], k: int, config: RetrieveConfig, by: Side = "answer") -> list[Found]:
    """The k best examples of each row among `bank` (training rows only; the caller sees to that)."""
    return Bank(bank, config, by).find(rows, k) if bank and k else [Found([], []) for _ in rows]


@dataclass(frozen=True)
class Audit:
    """What FAISS missed on a sample: share of the k best that it found (any of equal score counts), mean scores of both choices."""

    rows: int
    recall: float
    score: float
    exact_score: float


def audit(bank: Bank, rows: Sequence[Row], k: int) -> Audit:
    """Compare what the bank gives with its exact best."""
    pairs = [(f.scores, e.scores) for f, e in zip(bank.find(rows, k), bank.find(rows, k, exact=True), strict=True) if e.scores]
    recalls = [sum(s >= exact[-1] - 1e-3 for s in found) / len(exact) for found, exact in pairs]
    means = [float(np.mean([s for side in sides for s in side] or [0.0])) for sides in ([f for f, _ in pairs], [e for _, e in pairs])]
    return Audit(len(pairs), float(np.mean(recalls or [1.0])), *means)
