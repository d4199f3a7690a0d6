"""Words of a text: where they stand, which of them a compressor kept, and how the kept ones are put together again.

A word is a run of anything but white space. Compression removes whole words, so that two words are never glued into one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

Span = tuple[int, int]


def word_spans(text: str) -> list[Span]:
    """(start, end) of every word of `text`, in characters."""
    return [m.span() for m in re.finditer(r"\S+", text)]


def overlapping_spans(pieces: Sequence[Span], start: int, end: int) -> Iterator[int]:
    """Indices of the pieces that share characters with [start, end)."""
    low, high = 0, len(pieces)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if pieces[middle][1] <= start else (low, middle)
    while low < len(pieces) and pieces[low][0] < end:
        yield low
        low += 1


def tokens_by_span(pieces: Sequence[Span], offsets: Sequence[Span]) -> list[list[int]]:
    """Of each piece, the tokens that share characters with it; `offsets` are the characters of each token."""
    found: list[list[int]] = [[] for _ in pieces]
    for token, (start, end) in enumerate(offsets):
        for i in overlapping_spans(pieces, start, end):
            found[i].append(token)
    return found


def join_words(text: str, pieces: Sequence[Span], kept: Sequence[bool]) -> str:
    """The kept pieces in order. Neighbours keep the white space between them; over a gap it shrinks to a line break or a space."""
    out, last = "", -1
    for i, (start, end) in enumerate(pieces):
        if not kept[i]:
            continue
        if last >= 0:
            between = text[pieces[last][1] : start]
            gap = "\n" if "\n" in between else " "
            out += between if last == i - 1 else gap
        out += text[start:end]
        last = i
    return out


def find_kept_words(original: Sequence[str], output: Sequence[str]) -> list[bool]:
    """Which words of `original` stand in `output`, both in order.

    A compressor that only drops words is matched completely; of one that also rewrites, only the words taken over count.
    """
    kept = [False] * len(original)
    at = 0
    for word in output:
        try:
            at = original.index(word, at)
        except ValueError:
            break
        kept[at] = True
        at += 1
    else:
        return kept
    kept = [False] * len(original)
    for block in SequenceMatcher(None, original, output, autojunk=False).get_matching_blocks():
        kept[block.a : block.a + block.size] = [True] * block.size
    return kept
