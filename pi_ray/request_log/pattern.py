"""Patterns: what many texts have in common, as constant parts with values between them, such as a date or a name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from hashlib import blake2b
from itertools import takewhile
from typing import NamedTuple

SLOT = "\0"  # stands for a value; no text of a checked message holds it
WORD = re.compile(rf"[^\s{SLOT}]+|{SLOT}")
LEAST_RUN = 3  # words of a constant part between two values, unless it is a label or goes over a line's end
MOST_VALUES = 8
COMMON = 0.05  # least share of all texts that makes a kind of them
GROWN, MISSES = 150, 5  # texts that patterns are grown from; kinds in a row that are not common before there are none
SHINGLE, SHINGLED = 3, 400  # words of a sequence by which texts are compared first; words of a text that are compared
GLUE = re.compile(r"(?:is|are|was|the|an?|of|to|at|on|in|for|by|with|your|you|this|it|and|or)$", re.IGNORECASE)


class Likeness(NamedTuple):
    """The least that texts of one pattern share: a part of the shortest one's characters, and so many in one part."""

    share: float
    characters: int


@dataclass(frozen=True)
class Pattern:
    """Constant parts in their order, with a value between two neighbours; the first and last part may be empty.

    `shortest`: characters of the shortest text that the pattern was made from.
    """

    parts: tuple[str, ...]
    shortest: int

    @classmethod
    def of(cls, text: str) -> Pattern:
        """The pattern of one text, without values."""
        return cls((text,), len(text))

    @property
    def constant(self) -> int:
        """Characters of the constant parts."""
        return sum(map(len, self.parts))

    def values(self, text: str) -> tuple[str, ...] | None:
        """The values that `text` has between the constant parts; None where it lacks one of these."""
        if len(self.parts) == 1:
            return () if text == self.parts[0] else None
        first, *between, last = self.parts
        at, end = len(first), len(text) - len(last)
        if at > end or not text.startswith(first) or not text.endswith(last):
            return None
        found = []
        for part in between:  # the first place of each: if any places fit, these do
            place = text.find(part, at, end)
            if place < 0:
                return None
            found.append(text[at:place])
            at = place + len(part)
        return (*found, text[at:end])

    def merge(self, text: str, least: Likeness, anchors: Set[str] | None = None) -> Pattern | None:
        """The pattern of all that this one fits and of `text`; None where they are not so much alike.

        With `anchors` what is constant has such a word.
        """
        flat = SLOT.join(self.parts)
        runs = list(_common_runs(flat, text, anchors))
        runs = [run for run in runs if _is_edge(run, flat, text) or _is_constant(run, flat)]
        parts = [flat[run.start : run.end] for run in runs]
        if not runs or not (runs[0].start == 0 == runs[0].other):
            parts.insert(0, "")
        if len(parts) == 1 or runs[-1].end != len(flat) or runs[-1].other + len(parts[-1]) != len(text):
            parts.append("")
        merged = Pattern(tuple(parts), min(self.shortest, len(text)))
        longest = max(map(len, parts))
        alike = longest >= least.characters and merged.constant >= least.share * merged.shortest
        return merged if alike and longest else None

    def prune(self) -> Pattern:
        """The pattern with MOST_VALUES values: of more, those go together between which least is constant."""
        inner = self.parts[1:-1]
        longest = sorted(range(len(inner)), key=lambda i: -len(inner[i]))[: MOST_VALUES - 1]
        kept = (inner[i] for i in sorted(longest))
        return replace(self, parts=(self.parts[0], *kept, self.parts[-1])) if inner else self

    def value_names(self) -> list[str]:
        """A name for each value, after the words before it: `current_time` behind "The current time is"."""
        names: list[str] = []
        for before in self.parts[:-1]:
            sentence = re.split(r"[.!?\n]", before.rstrip())[-1]
            words = [w.lower() for w in re.findall(r"[^\W\d_]+", sentence) if not GLUE.match(w)][-2:]
            names.append("_".join(words) or "value")
        return names


class _Run(NamedTuple):
    """Characters [start, end) of one text that stand in the other from `other` on, and how many words they are."""

    start: int
    end: int
    other: int
    words: int


def _common_runs(text: str, other: str, anchors: Set[str] | None) -> Iterator[_Run]:
    """The runs of words that both texts have in one order, with equal white space in them and marks around them."""
    ours, theirs = ([m.span() for m in WORD.finditer(t)] for t in (text, other))
    last, last_other = 0, 0  # where the run before ends: two runs share no character of either text
    for i, j, size in _common_words([text[a:b] for a, b in ours], [other[a:b] for a, b in theirs], anchors):
        first = 0
        for n in range(1, size + 1):
            if n < size and text[ours[i + n - 1][1] : ours[i + n][0]] == other[theirs[j + n - 1][1] : theirs[j + n][0]]:
                continue
            start, end, at = ours[i + first][0], ours[i + n - 1][1], theirs[j + first][0]
            taken = max(0, last - start, last_other - at)  # by the run before, where a word is nothing but marks
            start, at = min(start + taken, end), at + min(taken, end - start)
            before = _equal_marks(text[last:start][::-1], other[last_other:at][::-1])
            after = _equal_marks(text[end:], other[at + end - start :])
            last, last_other = end + after, at + end - start + after
            yield _Run(start - before, last, at - before, n - first)
            first = n


def _common_words(words: Sequence[str], others: Sequence[str], anchors: Set[str] | None) -> Iterator[Sequence[int]]:
    """(place in `words`, place in `others`, number) of words in a row that both have, in one order.

    With `anchors` these are matched first, and then what stands beside them, as in a patience diff.
    """
    masked = words if anchors is None else [word if word in anchors else SLOT for word in words]
    *blocks, end = SequenceMatcher(None, masked, others, autojunk=False).get_matching_blocks()
    i = j = size = 0
    for next_i, next_j, next_size in (*blocks, end):
        while i + size < next_i and j + size < next_j and size and words[i + size] == others[j + size]:
            size += 1
        while next_size and next_i > i + size and next_j > j + size and words[next_i - 1] == others[next_j - 1]:
            next_i, next_j, next_size = next_i - 1, next_j - 1, next_size + 1
        if (next_i, next_j) == (i + size, j + size):
            size += next_size
            continue
        if size:
            yield i, j, size
        i, j, size = next_i, next_j, next_size
    if size:
        yield i, j, size


def _equal_marks(text: str, other: str) -> int:
    """How many characters both texts begin with that are no part of a word: white space, full stops, brackets."""
    pairs = takewhile(lambda pair: pair[0] == pair[1] and not pair[0].isalnum(), zip(text, other, strict=False))
    return sum(1 for _ in pairs)


def _is_edge(run: _Run, text: str, other: str) -> bool:
    """Whether both texts begin, or both end, with the run."""
    ends = run.end == len(text) and run.other + run.end - run.start == len(other)
    return run.start == 0 == run.other or ends


def _is_constant(run: _Run, text: str) -> bool:
    """Whether a run is long enough, or has a mark, to be no chance between two values."""
    return run.words >= LEAST_RUN or any(mark in text[run.start : run.end] for mark in ":\n")


def find_patterns(texts: Mapping[str, int], least: Likeness) -> list[Pattern]:
    """The patterns of texts with their numbers, the one of the most texts first.

    A pattern is grown from the commonest text that no other fits, over those of GROWN texts that are alike. After
    MISSES in a row that are not common there are no more.
    """
    order = sorted(texts, key=lambda text: (-texts[text], blake2b(text.encode()).digest()))[:GROWN]
    left, misses, found = dict(texts), 0, list[tuple[int, Pattern]]()
    shingles = {text: _shingles(text) for text in order}
    while misses < MISSES and (rest := [text for text in order if text in left]):
        alike = [text for text in rest if _may_be_alike(shingles[rest[0]], shingles[text], least)]
        pattern = _grow(rest[0], alike, least).prune()
        count = sum(left.pop(text) for text in [text for text in left if pattern.values(text) is not None])
        misses = 0 if is_common(count, sum(texts.values())) else misses + 1
        found.append((count, pattern))
    return [pattern for _, pattern in sorted(found, key=lambda item: -item[0])]


def _grow(leader: str, texts: Sequence[str], least: Likeness) -> Pattern:
    """The pattern of a text and of all others that are so much alike.

    Two texts may agree in words by chance, at the cost of words that all have. So it is grown a second time around the
    words that all its texts have equally often.
    """
    pattern = refined = Pattern.of(leader)
    for text in texts:
        if pattern.values(text) is None:
            pattern = pattern.merge(text, least) or pattern
    members = [text for text in texts if pattern.values(text) is not None]
    counts = [Counter(WORD.findall(text)).items() for text in (leader, *members)]
    anchors = frozenset(word for word, _ in set(counts[0]).intersection(*counts[1:]))
    for text in members:
        if refined.values(text) is None:
            refined = refined.merge(text, Likeness(0, 0), anchors) or refined
    fits = all(refined.values(text) is not None for text in members)
    return refined if fits and refined.constant > pattern.constant else pattern


def is_common(count: int, total: int) -> bool:
    """Whether so many of all are a kind of their own."""
    return count >= max(min(2, total), COMMON * total)


def _shingles(text: str) -> frozenset[int]:
    """Hashes of the sequences of three words that a text begins with."""
    words = text.split(maxsplit=SHINGLED)[:SHINGLED]
    return frozenset(hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1))


def _may_be_alike(one: frozenset[int], other: frozenset[int], least: Likeness) -> bool:
    """Whether it is worth comparing two texts word by word. A value breaks some sequences of what is constant."""
    return len(one & other) >= (least.share / 2 * max(1, min(len(one), len(other))) or SHINGLE)
