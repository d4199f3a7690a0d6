"""ROUGE-L of many pairs at once: F1 of the longest common subsequence of words (Lin, 2004), 0 to 100.

Words are those of rouge-score: a-z and 0-9, lower case. The subsequence is found by bit vectors (Hyyro, 2004), 64 words
of the reference at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pi_ray.retrieve import kernel
from pi_ray.retrieve.bleu import as_shared

BLOCK = 64  # references that a thread takes at a time


class RougeIndex:
    """As BleuIndex, with another score."""

    def __init__(self, bank: Sequence[str], groups: np.ndarray | None = None, threads: int = 1):
        self.known: dict[str, int] = {}
        self.words, self.ends = self._number_words(bank, grow=True)
        self.groups = np.full(len(bank), -1, dtype=np.int64) if groups is None else np.array(groups, dtype=np.int64)
        self.threads = threads
        as_shared(self.words, self.ends, self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def _number_words(self, texts: Sequence[str], grow: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The word numbers of all texts, one text after another (-1: not in the bank), and where each text ends."""
        numbers, ends, known = [], [0], self.known
        for text in texts:
            words = re.findall(r"[a-z0-9]+", text.lower())
            numbers += [known.setdefault(w, len(known)) for w in words] if grow else [known.get(w, -1) for w in words]
            ends.append(len(numbers))
        return np.array(numbers, dtype=np.int64), np.array(ends, dtype=np.int64)

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        """ROUGE-L of bank texts and each reference, shape (q, c) as `candidates`, or (q, bank)."""
        if candidates is None:
            candidates = np.broadcast_to(np.arange(len(self)), (len(references), len(self)))
        words, ends = self._number_words(references)
        out, candidates = np.zeros(candidates.shape), np.asarray(candidates, dtype=np.int64)
        kernel.rouge_of_pairs(len(self.known), self.words, self.ends, words, ends, candidates, out)
        return out

    def top(
        self, references: Sequence[str], k: int, groups: np.ndarray | None = None, among: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exact k best bank positions and their scores, as BleuIndex.top."""
        k, (words, ends) = min(k, len(self)), self._number_words(references)
        ids, best = np.full((len(references), k), -1, dtype=np.int64), np.full((len(references), k), -1.0)
        own = np.full(len(references), -2, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
        among = np.zeros((len(references), 0), dtype=np.int64) if among is None else np.asarray(among, dtype=np.int64)

        def search_block(begin: int) -> None:
            some = slice(begin, begin + BLOCK)
            question = words, ends[begin : begin + BLOCK + 1], own[some], among[some]
            kernel.rouge_top(len(self.known), self.words, self.ends, self.groups, *question, ids[some], best[some])

        if k:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(search_block, range(0, len(references), BLOCK)))
        return ids, best
