"""ROUGE-L of many pairs at once: F1 of the longest common subsequence of words (Lin, 2004), 0 to 100; words as in rouge-score: a-z and 0-9, lower case.

The longest common subsequence by bit vectors (Hyyro, 2004): 64 words of the reference at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pi_ray.retrieve import kernel

BLOCK = 64  # references of one piece of a thread's work


class RougeIndex:
    """As BleuIndex, with another score."""

    def __init__(self, bank: Sequence[str], groups: np.ndarray | None = None, threads: int = 1):
        self.known: dict[str, int] = {}
        self.words, self.ends = self._read(bank, grow=True)
        self.groups = np.full(len(bank), -1, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
        self.threads = threads

    def __len__(self) -> int:
        return len(self.groups)

    def _read(self, texts: Sequence[str], grow: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of all words in a row (-1: the bank has no such word), and where each text ends."""
        words, ends, known = [], [0], self.known
        for text in texts:
            own = re.findall(r"[a-z0-9]+", text.lower())
            words += [known.setdefault(w, len(known)) for w in own] if grow else [known.get(w, -1) for w in own]
            ends.append(len(words))
        return np.array(words, dtype=np.int64), np.array(ends, dtype=np.int64)

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        """ROUGE-L of bank texts and each reference, shape (q, c) as `candidates`, or (q, bank)."""
        if candidates is None:
            candidates = np.broadcast_to(np.arange(len(self)), (len(references), len(self)))
        out = np.zeros(candidates.shape)
        kernel.rouge_of_pairs(len(self.known), self.words, self.ends, *self._read(references), np.asarray(candidates, dtype=np.int64), out)
        return out

    def top(self, references: Sequence[str], k: int, groups: np.ndarray | None = None, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The exact k best bank positions and their scores, as BleuIndex.top."""
        k, (words, ends) = min(k, len(self)), self._read(references)
        ids, best = np.full((len(references), k), -1, dtype=np.int64), np.full((len(references), k), -1.0)
        own = np.full(len(references), -2, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
        among = np.zeros((len(references), 0), dtype=np.int64) if among is None else np.asarray(among, dtype=np.int64)

        def work(at: int) -> None:
            some = slice(at, at + BLOCK)
            question = words, ends[at : at + BLOCK + 1], own[some], among[some]
            kernel.rouge_top(len(self.known), self.words, self.ends, self.groups, *question, ids[some], best[some])

        if k:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(work, range(0, len(references), BLOCK)))
        return ids, best
