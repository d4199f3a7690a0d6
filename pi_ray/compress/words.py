"""The words of a text: their positions, which of them a compressor kept, and the text that the kept ones make.

A word is a run of anything but white space. Compression removes whole words, so that no two are glued into one.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

Span = tuple[int, int]  # (start, end) in characters of a text


def word_spans(text: str) -> list[Span]:
    """The span of every word of `text`, in order."""
    return [m.span() for m in re.finditer(r"\S+", text)]


def tokens_by_span(pieces: Sequence[Span], offsets: Sequence[Span]) -> list[list[int]]:
    """For each piece the indices of the tokens that share characters with it; `offsets` are the spans of the tokens."""
    found: list[list[int]] = [[] for _ in pieces]
    ends = [end for _, end in pieces]
    for token, (start, end) in enumerate(offsets):
        for i in range(bisect_right(ends, start), len(pieces)):
            if pieces[i][0] >= end:
                break
            found[i].append(token)
    return found


def split_chunks(text: str, pieces: Sequence[Span], sizes: Sequence[int], room: int) -> Iterator[range]:
    """Runs of pieces, as ranges of indices, whose `sizes` sum to at most `room`; a single piece may be larger.

    A run ends with the last sentence or line that ends in its second half, if one does.
    """
    first = 0
    while first < len(pieces):
        last, used = first + 1, sizes[first]
        while last < len(pieces) and used + sizes[last] <= room:
            used += sizes[last]
            last += 1
        if last < len(pieces):
            for i in range(last, (first + last) // 2, -1):
                end = pieces[i - 1][1]
                if text[end - 1] == "." or "\n" in text[end : pieces[i][0]]:
                    last = i
                    break
        yield range(first, last)
        first = last


def join_words(text: str, pieces: Sequence[Span], kept: Sequence[bool]) -> str:
    """The kept pieces in order, with the white space between neighbours, and a line break or a space over a gap."""
    parts: list[str] = []
    last = 0
    for i, (start, end) in enumerate(pieces):
        if kept[i]:
            if parts:
                between = text[pieces[last][1] : start]
                parts.append(between if last == i - 1 else "\n" if "\n" in between else " ")
            parts.append(text[start:end])
            last = i
    return "".join(parts)


def kept_in_order(original: Sequence[str], output: Sequence[str]) -> list[bool] | None:
    """Which words of `original` stand in `output`, both in order; None where the output has other words.

    Linear in both, which may come from a stranger.
    """
    kept, at = [False] * len(original), 0
    for word in output:
        try:
            at = original.index(word, at)
        except ValueError:
            return None
        kept[at] = True
        at += 1
    return kept


def find_kept_words(original: Sequence[str], output: Sequence[str]) -> list[bool]:
    """Which words of `original` stand in `output`, both in order; of an output with other words, the equal ones."""
    if (exact := kept_in_order(original, output)) is not None:
        return exact
    kept = [False] * len(original)
    for block in SequenceMatcher(None, original, output, autojunk=False).get_matching_blocks():
        kept[block.a : block.a + block.size] = [True] * block.size
    return kept
