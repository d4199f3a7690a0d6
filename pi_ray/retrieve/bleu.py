"""Exact sentence BLEU of many pairs at once, equal to sacrebleu's (13a, effective order, exponential smoothing).

The bank is kept inverted: for each n-gram the texts that hold it. One pass over the lists of a reference's n-grams
gives its clipped matches with the whole bank. The same n-grams make the vectors by which FAISS proposes candidates.

s(y_i, y_j) of paper equation 3: the candidate y_j is the hypothesis and the row's own y_i the reference, so an example
scores high when it says what the row needs.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from pi_ray.retrieve import kernel
from pi_ray.retrieve.index import ScoreIndex, as_shared
from pi_ray.retrieve.ngrams import BankNgrams

DIMENSION = 320  # of the vectors


class BleuIndex(ScoreIndex):
    """The texts of an example bank, as hypotheses."""

    def __init__(self, bank: Sequence[str], groups: np.ndarray | None = None):
        super().__init__(bank, groups)
        self.ngrams = BankNgrams(bank)
        bounds, counts = self.ngrams.bounds, self.ngrams.counts
        shape = (len(bank), max(int(bounds[-1]), 1))
        holds = sparse.csr_matrix((counts.times, counts.ids, counts.indptr), shape=shape).tocsc()
        self.holding = holds.indptr.astype(np.int64), holds.indices, holds.data
        self.places = _places(np.diff(holds.indptr))
        as_shared(self.places, bounds, *self.holding, *counts)

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        positions = self._positions(candidates, len(references))
        out = np.zeros(positions.shape)
        kernel.bleu_of_pairs(self.ngrams.bounds, self.ngrams.counts, self.ngrams(references), positions, out)
        return out

    def _search(
        self, references: Sequence[str], own: np.ndarray, among: np.ndarray | None, ids: np.ndarray, best: np.ndarray,
    ) -> None:
        bounds, bank, asked = self.ngrams.bounds, self.ngrams.counts, self.ngrams(references)
        if among is None:
            kernel.bleu_top(bounds, self.holding, bank.lengths, self.groups, asked, own, ids, best)
        else:
            kernel.bleu_top_among(bounds, bank, self.groups, asked, own, among, ids, best)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, near where BLEU is high: n-grams hashed into places. Returns float32, (texts, DIMENSION).

        An n-gram of one bank text alone matches no other, would only disturb, and is left out.
        """
        out = np.zeros((len(texts), DIMENSION), dtype=np.float32)
        kernel.vectors(self.places, self.ngrams(texts), out)
        return out


def _places(holders: np.ndarray) -> np.ndarray:
    """2 x place in the vectors + sign of each n-gram, from how many texts hold it; -1 for fewer than two. int32.

    N-grams take places in turn, the most frequent first, with the other sign each round, so the heaviest do not meet.
    """
    rank = np.empty(len(holders), dtype=np.int64)
    rank[np.argsort(-holders, kind="stable")] = np.arange(len(holders))
    turn, place = np.divmod(rank, DIMENSION)
    return np.where(holders > 1, 2 * place + turn % 2, -1).astype(np.int32)
