"""Exact sentence BLEU of many pairs at once, equal to sacrebleu's (13a tokenizer, effective order, exponential smoothing).

Clipped n-gram matches are min(a, b) = sum over levels l of [a >= l][b >= l], so for all pairs they are a product of sparse 0/1
matrices with one column for each (n-gram, level). Scores are on sacrebleu's scale, 0 to 100.

s(y_i, y_j) of paper equation 3: the candidate y_j is the hypothesis and the row's own y_i the reference, so an example scores high
when what it says is what the row needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from scipy import sparse

ORDER = 4
PAIRS = 2_000_000  # pairs scored at once: bounds memory to about 100 MB
_TOKENIZE = BLEU(effective_order=True)._preprocess_segment


def _counts(text: str) -> list[Counter]:
    """How often each n-gram stands in `text`, for n = 1 to 4."""
    tokens = _TOKENIZE(text).split()
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, ORDER + 1)]


class BleuIndex:
    """The texts of an example bank, as hypotheses. Texts are known by their position, 0 to len - 1."""

    def __init__(self, bank: Sequence[str]):
        counts = [_counts(text) for text in bank]
        self.columns: list[dict] = [{} for _ in range(ORDER)]
        self.matrices = [self._matrix([c[n] for c in counts], n, grow=True) for n in range(ORDER)]
        self.lengths = np.array([sum(c[0].values()) for c in counts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def _matrix(self, counts: Sequence[Counter], n: int, grow: bool = False) -> sparse.csr_matrix:
        """0/1 matrix, shape (len(counts), columns): a one for each level of each n-gram. Unknown n-grams match nothing: left out."""
        columns, indices, indptr = self.columns[n], [], [0]
        for counter in counts:
            for gram, times in counter.items():
                for level in range(times):
                    column = columns.setdefault((gram, level), len(columns)) if grow else columns.get((gram, level))
                    if column is not None:
                        indices.append(column)
            indptr.append(len(indices))
        return sparse.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=(len(counts), max(len(columns), 1)))

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        """BLEU of bank texts against each reference.

        `candidates` are bank positions, shape (q, c); without them every bank text is scored. Returns float64 of shape (q, c) or (q, bank).
        """
        counts = [_counts(text) for text in references]
        ref_length = np.array([sum(c[0].values()) for c in counts], dtype=np.int64)[:, None]
        chosen = np.arange(len(self))[None, :] if candidates is None else np.asarray(candidates)
        hyp_length = np.broadcast_to(self.lengths[chosen], (len(references), chosen.shape[1]))
        matches = np.zeros((ORDER, *hyp_length.shape), dtype=np.float64)
        for n, bank in enumerate(self.matrices):
            rows = self._matrix([c[n] for c in counts], n)
            if candidates is None:
                matches[n] = (rows @ bank.T).toarray()
            elif chosen.size:
                pairs = rows[np.repeat(np.arange(len(references)), chosen.shape[1])].multiply(bank[chosen.ravel()])
                matches[n] = np.asarray(pairs.sum(axis=1)).reshape(hyp_length.shape)
        return _bleu(matches, hyp_length, ref_length)

    def top(self, references: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact k best bank positions and their scores for each reference, shapes (q, k'), k' = min(k, bank). Ties: lower position first."""
        step = max(PAIRS // max(len(self), 1), 1)
        k = min(k, len(self))
        ids, best = np.zeros((len(references), k), dtype=np.int64), np.zeros((len(references), k))
        for at in range(0, len(references), step):
            block = self.scores(references[at : at + step])
            order = np.argsort(-np.round(block, 6), axis=1, kind="stable")[:, :k]
            ids[at : at + step], best[at : at + step] = order, np.take_along_axis(block, order, axis=1)
        return ids, best


def _bleu(matches: np.ndarray, hyp: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """BLEU from clipped matches (4, q, c), hypothesis lengths (q, c) and reference lengths (q, 1)."""
    totals = np.stack([np.maximum(hyp - n, 0) for n in range(ORDER)])
    exists = totals > 0
    missing = exists & (matches == 0)
    smooth = 2.0 ** np.cumsum(missing, axis=0)  # the i-th order without a match counts as 1/2^i of one
    precision = np.where(missing, 1.0 / smooth, matches) / np.maximum(totals, 1)
    logs = np.where(exists, np.log(np.where(exists, precision, 1.0)), 0.0).sum(axis=0)
    order = np.maximum(exists.sum(axis=0), 1)
    brevity = np.where(hyp < ref, np.exp(1 - ref / np.maximum(hyp, 1)), 1.0)
    return np.where(matches.any(axis=0), 100.0 * brevity * np.exp(logs / order), 0.0)
