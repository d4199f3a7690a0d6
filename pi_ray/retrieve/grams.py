"""Texts as counted n-grams, n = 1 to 4, over numbers instead of words: what BLEU compares, tokenised as sacrebleu does (13a).

A number stands for one n-gram of the bank; those of one order follow each other, so that `bounds` tells the order of a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

ORDER = 4
ROWS = 65536  # texts whose n-grams are counted at once: bounds the memory that sorting takes
MARKS = str.maketrans({chr(c): f" {chr(c)} " for a, b in ("{~", "[`", " &", "(+", ":@", "//") for c in range(ord(a), ord(b) + 1)})
UNMARKED = (("<skipped>", ""), ("-\n", ""), ("\n", " "))
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokens(text: str) -> list[str]:
    """What mteval-v13a, and so sacrebleu, takes as the words of `text`. Most texts need but a part of its rules, which makes this five times as fast."""
    line = text.rstrip()
    for old, new in UNMARKED if "\n" in line or "<skipped>" in line else ():
        line = line.replace(old, new)
    for old, new in ENTITIES if "&" in line else ():
        line = line.replace(old, new)
    line = f" {line} ".translate(MARKS)
    if "." in line or "," in line:
        line = re.sub(r"([.,])([^0-9])", r" \1 \2", re.sub(r"([^0-9])([.,])", r"\1 \2 ", line))
    if "-" in line:
        line = re.sub(r"([0-9])(-)", r"\1 \2 ", line)
    return line.split()


@dataclass(frozen=True)
class Counts:
    """Of each text its n-grams, ascending: `ids` and `times` of text i lie at indptr[i] to indptr[i + 1]. `lengths` are in tokens."""

    indptr: np.ndarray  # int64, (texts + 1,)
    ids: np.ndarray  # int32
    times: np.ndarray  # int32
    lengths: np.ndarray  # int64, (texts,)

    def of(self, texts: np.ndarray) -> Counts:
        """Those of the texts at these positions, in this order."""
        sizes = np.diff(self.indptr)[texts]
        indptr = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(indptr[-1]) + np.repeat(self.indptr[texts] - indptr[:-1], sizes)
        return Counts(indptr, self.ids[places], self.times[places], self.lengths[texts])


class Grams:
    """The n-grams of a bank of texts. Those of other texts that the bank does not have match nothing and are left out."""

    def __init__(self, bank: Sequence[str]):
        self.positions = {text: i for i, text in enumerate(bank)}
        self.words: dict[str, int] = {}
        words, lengths = self._read(bank, grow=True)
        self.keys: list[np.ndarray] = []  # of each order above 1, ascending: (number of the n-gram without its last word) x words + last word
        number = words
        for n in range(1, ORDER):
            key = self._key(number, words, lengths, n)
            self.keys.append(np.unique(key[key >= 0]))
            number = _place(self.keys[-1], key)
        self.bounds = np.cumsum([0, len(self.words), *map(len, self.keys)])
        self.counts = self._count(words, lengths)

    def __call__(self, texts: Sequence[str]) -> Counts:
        known = [self.positions.get(text, -1) for text in texts]
        if -1 in known:
            return self._count(*self._read(texts))
        return self.counts.of(np.array(known, dtype=np.int64))  # rows of the bank itself: counted already

    def _read(self, texts: Iterable[str], grow: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Word numbers of all texts in a row (-1: unknown), and the length of each text."""
        words: list[int] = []
        lengths: list[int] = []
        known = self.words
        for text in texts:
            own = tokens(text)
            words += [known.setdefault(t, len(known)) for t in own] if grow else [known.get(t, -1) for t in own]
            lengths.append(len(own))
        return np.array(words, dtype=np.int64), np.array(lengths, dtype=np.int64)

    def _key(self, number: np.ndarray, words: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
        """Key of the (n + 1)-gram that begins at each place, from the number of the n-gram there; -1 where there is none."""
        last = np.full_like(words, -1)
        last[: max(len(words) - n, 0)] = words[n:]
        room = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words)) > n
        return np.where(room & (number >= 0) & (last >= 0), number * len(self.words) + last, -1)

    def _count(self, words: np.ndarray, lengths: np.ndarray) -> Counts:
        ends = np.concatenate([[0], np.cumsum(lengths)])
        ids, times, sizes = [], [], [np.zeros(1, dtype=np.int64)]
        for at in range(0, len(lengths), ROWS):
            some = lengths[at : at + ROWS]
            part = words[ends[at] : ends[at + len(some)]]
            rows, found = self._all(part, some)
            code, repeats = np.unique(rows * self.bounds[-1] + found, return_counts=True)
            ids.append((code % self.bounds[-1]).astype(np.int32))
            times.append(repeats.astype(np.int32))
            sizes.append(np.bincount(code // self.bounds[-1], minlength=len(some)))
        empty = np.zeros(0, dtype=np.int32)
        return Counts(np.cumsum(np.concatenate(sizes)), np.concatenate([empty, *ids]), np.concatenate([empty, *times]), lengths)

    def _all(self, words: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(text, number) of every n-gram of every order that the bank knows."""
        rows = np.repeat(np.arange(len(lengths)), lengths)
        number, found = words, [(rows[words >= 0], words[words >= 0])]
        for n in range(1, ORDER):
            number = _place(self.keys[n - 1], self._key(number, words, lengths, n))
            found.append((rows[number >= 0], number[number >= 0] + self.bounds[n]))
        return np.concatenate([r for r, _ in found]), np.concatenate([g for _, g in found])


def _place(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted key stands among the ascending `keys`; -1 where it does not."""
    if not len(keys):
        return np.full(len(wanted), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)
