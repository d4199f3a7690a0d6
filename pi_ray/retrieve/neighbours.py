"""Neighbours: the training rows that serve as examples of a row, paper equation 3.

The examples of row i are the (x_j, y_j), j != i, with the k highest s(y_i, y_j). Training rows are compared by their
answers (or queries, retrieve.by); dev and test rows, whose answers are not known, by their queries. A bank of up to
EXACT_ROWS is searched whole; in a larger one the score ranks what FAISS proposes. A row is never given itself, nor a
row with the same query, which would hand over the answer.
"""

import hashlib
from collections.abc import Iterable, Sequence
from heapq import nsmallest
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pi_ray.config import RetrieveConfig
from pi_ray.protocols import Encoder, Row
from pi_ray.retrieve.candidates import Candidates
from pi_ray.retrieve.encoders import ConfiguredEncoder
from pi_ray.retrieve.ngrams import hash_texts

# Two cores find the ten best of so many answers in 40 seconds, FAISS in a fourteenth of that (tests/bench/retrieval.py)
EXACT_ROWS = 100_000


def normalised(query: str) -> str:
    """Queries that differ in case or white space only are the same query."""
    return " ".join(query.casefold().split())


def question_of(row: Any) -> str:
    """Return what a row asks, its normalised query and a hash of its documents: rows that ask the same are the same."""
    query, documents = normalised(row.query), getattr(row, "documents", ())
    if not documents:
        return query
    digest = hashlib.sha256("\0".join(documents).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{query} [documents {digest[:16]}]"


class Neighbours(NamedTuple):
    """Bank ids, best first, and their scores (0 to 100)."""

    ids: list[str]
    scores: list[float]


def choose_bank(ids: Sequence[str], fraction: float) -> set[str]:
    """The ids of this share of the rows (paper 5.5): those that hash lowest, so a larger bank holds a smaller one."""
    if fraction == 1:
        return set(ids)
    size = max(1, round(len(ids) * fraction))
    return set(nsmallest(size, ids, key=lambda i: hashlib.sha256(i.encode()).digest()))


def scores_all_pairs(config: RetrieveConfig, rows: int) -> bool:
    """Whether every pair is scored in a bank of so many rows."""
    return config.method == "exact" or (config.method == "auto" and rows <= EXACT_ROWS)


class Bank:
    """Training rows, indexed by one side. Processes of a node that get it from Ray's object store share its arrays."""

    def __init__(self, rows: Iterable[Row], config: RetrieveConfig, by: Literal["answer", "query"] = "answer"):
        # numba and scipy load with them, so only where a bank is made
        from pi_ray.retrieve.bleu import BleuIndex
        from pi_ray.retrieve.index import CosineIndex, ScoreIndex
        from pi_ray.retrieve.rouge import RougeIndex

        # position follows id, so that a tie goes to the smaller id
        entries = sorted((r.id, getattr(r, by), question_of(r)) for r in rows)
        texts = [text for _, text, _ in entries]
        self.ids = pa.array([i for i, *_ in entries], pa.string())
        self.texts = pa.array(texts, pa.large_string()) if config.diversity else None
        self.by, self.config = by, config
        self.is_exact = scores_all_pairs(config, len(entries))
        groups = _groups(question for *_, question in entries)
        encoder: Encoder = ConfiguredEncoder(config)
        self.index: ScoreIndex
        if config.score == "bleu":
            self.index = bleu = BleuIndex(texts, groups)
            encoder = bleu if config.encoder == "ngram" else encoder  # it has counted the n-grams already
        elif config.score == "rouge-l":
            self.index = RougeIndex(texts, groups)
        else:
            self.index = CosineIndex(encoder, texts, groups)
        self.candidates = None if self.is_exact else Candidates(encoder, texts)

    def find(self, rows: Sequence[Row], k: int, exact: bool | None = None) -> list[Neighbours]:
        """The k best examples of each row; fewer when the bank has no more, or with retrieve.diversity no others."""
        exact = self.is_exact if exact is None else exact
        found: dict[int, Neighbours] = {}
        todo = list(range(len(rows)))
        count = max(self.config.candidates, k) if self.config.diversity or not exact else k
        while todo:
            asked = [rows[i] for i in todo]
            texts, groups = [getattr(r, self.by) for r in asked], _groups(map(question_of, asked))
            among = None if exact or self.candidates is None else self.candidates.nearest(texts, count)
            positions, scores = self.index.top(texts, count if self.config.diversity else k, groups, among)
            for i, near, values in zip(todo, positions, scores, strict=True):
                found[i] = self._choose(near[near >= 0], values[near >= 0], k)
            todo = [i for i in todo if len(found[i].ids) < k] if count < len(self.ids) else []
            count *= 4  # rows that are left out took too many places
        return [found[i] for i in range(len(rows))]

    def _choose(self, positions: np.ndarray, scores: np.ndarray, k: int) -> Neighbours:
        """The first k; with retrieve.diversity the first k that are not too near to a better one."""
        chosen: list[int] = []
        is_open = np.ones(len(positions), dtype=bool)
        for place in range(len(positions)):
            if len(chosen) == k:
                break
            if not is_open[place]:
                continue
            chosen.append(place)
            if self.texts is not None:
                similar = self.index.scores([self.texts[int(positions[place])].as_py()], positions[None])[0]
                is_open &= similar <= 100.0 * (1.0 - self.config.diversity)
        ids = self.ids.take(pa.array(positions[chosen], pa.int64())).to_pylist()
        return Neighbours(ids, [round(float(scores[p]), 4) for p in chosen])


def _groups(questions: Iterable[str]) -> np.ndarray:
    """A number from 0 on for each question, equal for those that are the same. int64."""
    return hash_texts(questions, np.int64) & np.iinfo(np.int64).max


def audit_bank(bank: Bank, rows: Sequence[Row], k: int) -> dict[str, float]:
    """The share of the k best of each row that the bank gives (equal scores count), and the mean scores of both."""
    both = zip(bank.find(rows, k), bank.find(rows, k, exact=True), strict=True)
    pairs = [(found.scores, best.scores) for found, best in both if best.scores]
    recalls = [sum(s >= best[-1] - 1e-3 for s in found) / len(best) for found, best in pairs]
    sides = [found for found, _ in pairs], [best for _, best in pairs]
    means = [float(np.mean([s for scores in side for s in scores] or [0.0])) for side in sides]
    return {"rows": len(pairs), "recall": float(np.mean(recalls or [1.0])), "score": means[0], "exact_score": means[1]}
