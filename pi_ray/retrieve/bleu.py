"""Exact sentence BLEU of many pairs at once, equal to sacrebleu's (13a tokenizer, effective order, exponential
smoothing).

The bank is kept inverted: for each n-gram the texts that hold it. One pass over the lists of a reference's n-grams
gives its clipped matches with the whole bank. Scores are on sacrebleu's scale, 0 to 100. The same n-grams make the
vectors by which FAISS proposes candidates.

s(y_i, y_j) of paper equation 3: the candidate y_j is the hypothesis and the row's own y_i the reference, so an example
scores high when it says what the row needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import sparse

from pi_ray.retrieve import kernel
from pi_ray.retrieve.ngrams import BankNgrams

BLOCK = 128  # references that a thread takes at a time
DIMENSION = 320  # of the vectors


def as_shared(*arrays: np.ndarray) -> None:
    """Make arrays read-only, as Ray's object store returns them, so that numba compiles its loops once."""
    for array in arrays:
        array.setflags(write=False)


class BleuIndex:
    """The texts of an example bank, as hypotheses. Texts are known by their position, 0 to len - 1.

    `groups` are numbers: a reference that has one is not compared with the texts of its own group.
    """

    def __init__(self, bank: Sequence[str], groups: np.ndarray | None = None, threads: int = 1):
        self.ngrams = BankNgrams(bank)
        self.groups = np.full(len(bank), -1, dtype=np.int64) if groups is None else np.array(groups, dtype=np.int64)
        self.threads = threads
        counts = self.ngrams.counts
        shape = (len(bank), max(int(self.ngrams.bounds[-1]), 1))
        holds = sparse.csr_matrix((counts.times, counts.ids, counts.indptr), shape=shape).tocsc()
        self.holding = holds.indptr.astype(np.int64), holds.indices, holds.data
        self.places = _places(np.diff(holds.indptr))
        bank_ngrams = self.ngrams.bounds, counts.indptr, counts.ids, counts.times, counts.lengths
        as_shared(self.groups, self.places, *self.holding, *bank_ngrams)

    def __len__(self) -> int:
        return len(self.groups)

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        """BLEU of bank texts against each reference.

        `candidates` are bank positions, shape (q, c); without them every bank text is scored.
        Returns float64 of shape (q, c) or (q, bank).
        """
        if candidates is None:
            candidates = np.broadcast_to(np.arange(len(self)), (len(references), len(self)))
        bank, asked, out = self.ngrams.counts, self.ngrams(references), np.zeros(candidates.shape)

        def score_block(begin: int) -> None:
            some, indptr = slice(begin, begin + BLOCK), asked.indptr[begin : begin + BLOCK + 1]
            kernel.bleu_of_pairs(
                self.ngrams.bounds, bank.indptr, bank.ids, bank.times, bank.lengths, indptr, asked.ids, asked.times,
                asked.lengths[some], np.asarray(candidates[some], dtype=np.int64), out[some],
            )

        self._in_threads(score_block, len(references))
        return out

    def top(
        self, references: Sequence[str], k: int, groups: np.ndarray | None = None, among: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact k best bank positions and their scores for each reference, shapes (q, k'), k' = min(k, bank).

        Ties: lower position first. `groups` are those of the references, -2 for none. `among` are the only positions
        that may be chosen, shape (q, c), -1 for none. Where these leave fewer than k', the last positions are -1.
        """
        k, asked = min(k, len(self)), self.ngrams(references)
        ids, best = np.full((len(references), k), -1, dtype=np.int64), np.full((len(references), k), -1.0)
        own = np.full(len(references), -2, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
        bounds, bank = self.ngrams.bounds, self.ngrams.counts

        def search_block(begin: int) -> None:
            some, indptr = slice(begin, begin + BLOCK), asked.indptr[begin : begin + BLOCK + 1]
            question = indptr, asked.ids, asked.times, asked.lengths[some], own[some]
            if among is None:
                kernel.bleu_top(bounds, *self.holding, bank.lengths, self.groups, *question, ids[some], best[some])
            else:
                kernel.bleu_top_among(
                    bounds, bank.indptr, bank.ids, bank.times, bank.lengths, self.groups, *question,
                    np.asarray(among[some], dtype=np.int64), ids[some], best[some],
                )

        if k:
            self._in_threads(search_block, len(references))
        return ids, best

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, near where BLEU is high: n-grams that bank texts share, hashed into `DIMENSION`
        places.

        An n-gram of one bank text alone matches no other and would only disturb. Returns float32, (texts, DIMENSION).
        """
        asked, out = self.ngrams(texts), np.zeros((len(texts), DIMENSION), dtype=np.float32)

        def encode_block(begin: int) -> None:
            indptr = asked.indptr[begin : begin + BLOCK + 1]
            kernel.vectors(self.places, indptr, asked.ids, asked.times, out[begin : begin + BLOCK])

        self._in_threads(encode_block, len(texts))
        return out

    def _in_threads(self, work: Callable[[int], None], rows: int) -> None:
        """Call `work` with the first row of each block."""
        begins = range(0, rows, BLOCK)
        if self.threads == 1:
            for begin in begins:
                work(begin)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, begins))


def _places(holders: np.ndarray) -> np.ndarray:
    """2 x place in the vectors + sign of each n-gram, from how many texts hold it; -1 for fewer than two. int32.

    N-grams take the places in turn, the most frequent first, with the other sign in each round: so the heaviest do not
    meet.
    """
    rank = np.empty(len(holders), dtype=np.int64)
    rank[np.argsort(-holders, kind="stable")] = np.arange(len(holders))
    turn, place = np.divmod(rank, DIMENSION)
    return np.where(holders > 1, 2 * place + turn % 2, -1).astype(np.int32)
