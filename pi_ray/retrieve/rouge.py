"""ROUGE-L of many pairs at once: F1 of the longest common subsequence of words (Lin, 2004), 0 to 100.

Words are letters and digits of every script in lower case, in English those of rouge-score. Bit vectors find the
subsequence (Hyyro, 2004), 64 words each.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from pi_ray.retrieve.index import ScoreIndex, as_shared
from pi_ray.retrieve.ngrams import number_words
from pi_ray.units import WORD


class RougeIndex(ScoreIndex):
    """An example bank by ROUGE-L."""

    def __init__(self, bank: Sequence[str], groups: np.ndarray | None = None):
        super().__init__(bank, groups)
        self.known: dict[str, int] = {}
        self.words, self.ends = self._number_words(bank, grow=True)
        as_shared(self.words, self.ends)

    def _number_words(self, texts: Sequence[str], grow: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The word numbers of all texts, one text after another (-1: not in the bank), and where each text ends."""
        words, lengths = number_words((WORD.findall(text.lower()) for text in texts), self.known, grow)
        return words, np.concatenate([[0], np.cumsum(lengths)])

    def scores(self, references: Sequence[str], candidates: np.ndarray | None = None) -> np.ndarray:
        positions = self._positions(candidates, len(references))
        out = np.zeros(positions.shape)
        rouge_of_pairs(len(self.known), self.words, self.ends, *self._number_words(references), positions, out)
        return out


@njit(nogil=True, cache=True)
def rouge_of_pairs(vocabulary, words, ends, q_words, q_ends, candidates, out):
    """out[i, c] = ROUGE-L of bank text candidates[i, c] and reference i. A text's last entry of `ends` is its end."""
    longest = 1
    for i in range(len(q_ends) - 1):
        longest = max(longest, q_ends[i + 1] - q_ends[i])
    width = (longest + 63) >> 6
    # bit b of masks[w, v] says that word 64 v + b of the reference is w
    masks, row = np.zeros((vocabulary, width), np.uint64), np.zeros(width, np.uint64)
    for i in range(len(q_ends) - 1):
        begin, size = q_ends[i], q_ends[i + 1] - q_ends[i]
        for b in range(size):
            if q_words[begin + b] >= 0:
                masks[q_words[begin + b], b >> 6] |= np.uint64(1) << np.uint64(b & 63)
        for c in range(candidates.shape[1]):
            j = candidates[i, c]
            shared = common(masks, size, row, words, ends[j], ends[j + 1])
            out[i, c] = 200.0 * shared / max(size + ends[j + 1] - ends[j], 1)
        for b in range(size):
            if q_words[begin + b] >= 0:
                masks[q_words[begin + b], b >> 6] = np.uint64(0)


@njit(nogil=True, cache=True)
def common(masks, size, row, words, begin, end):
    """Length of the longest common subsequence of words[begin:end] and the marked `size` words. `row`: scratch."""
    used = (size + 63) >> 6
    row[:used] = ~np.uint64(0)
    for p in range(begin, end):
        carry = np.uint64(0)
        for v in range(used):
            same = row[v] & masks[words[p], v]
            half = row[v] + same
            total = half + carry
            carry = np.uint64(1) if half < same or total < half else np.uint64(0)
            row[v] = total | (row[v] - same)
    length = 0
    for b in range(size):
        if not (row[b >> 6] >> np.uint64(b & 63)) & np.uint64(1):
            length += 1
    return length
