"""Facts of a template: codes that labels copy from it and no query brings, such as r9 in the line "checkout: r9".

A model can answer such a row in two ways: read the line, or know the label by heart. Reading drills (drills.py)
exchange the codes, so that only reading helps.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from pi_ray.prompt import split_sections

FEWEST = 3  # codes of a group, each on a line of its own: fewer are no list
FEWEST_USED = 2  # codes of a group that labels use
WORD = re.compile(r"[^\W_](?:[\w./-]*[^\W_])?")  # ends with a letter or digit, so a full stop is no part of it


@dataclass(frozen=True)
class FactGroup:
    """The codes of one shape in one section of a template, in their order there. `used`: those that stand in labels."""

    section: str  # its heading; of the text before the first heading its first line
    shape: str
    words: tuple[str, ...]
    used: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.words[:4]) + (", ..." if len(self.words) > 4 else "")
        return f"{len(self.words)} codes under '{self.section}' ({shown}), {len(self.used)} of them in labels"


def shape_of(word: str) -> str:
    """The kind of each character: r9 -> a0, QX-417 -> AA-000."""
    kinds = ((str.isdigit, "0"), (str.isupper, "A"), (str.isalpha, "a"))
    return "".join(next((kind for test, kind in kinds if test(c)), c) for c in word)


def is_heading(line: str) -> bool:
    """Whether a section begins with this line."""
    return line.startswith("## ")


def is_code(word: str) -> bool:
    """Whether a word looks like a code: a digit beside a letter, or a number of three digits or more."""
    digits = sum(map(str.isdigit, word))
    return bool(digits) and (any(map(str.isalpha, word)) or digits >= 3)


def find_facts(
    template: str, rows: Iterable[tuple[str, str]], words: Collection[str] = (), ignore: Collection[str] = ()
) -> list[FactGroup]:
    """The fact groups of a template's text; `rows` are pairs of (query, answer), read once.

    `words` are facts whatever they look like; groups with a word of `ignore` are left out. A code that any query brings
    need not be read, so its group is none.
    """
    known = set(WORD.findall(template))
    asked: set[str] = set()
    answered: set[str] = set()
    for query, answer in rows:
        asked |= known.intersection(WORD.findall(query))
        answered |= known.intersection(WORD.findall(answer))
    groups = []
    for section in split_sections(template):
        for shape, found in _codes_by_shape(section, set(words)):
            used = tuple(word for word in found if word in answered)
            if len(used) >= FEWEST_USED and not asked.intersection(found) and not set(ignore).intersection(found):
                groups.append(FactGroup(section.strip().split("\n")[0], shape, found, used))
    return groups


def _codes_by_shape(section: str, words: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(shape, its words) for each shape that has words on FEWEST lines or more."""
    by_shape: dict[str, dict[str, int]] = {}
    for number, line in enumerate(section.split("\n")):
        if is_heading(line):  # no line of a list
            continue
        for word in WORD.findall(line):
            if is_code(word) or word in words:
                by_shape.setdefault(shape_of(word), {}).setdefault(word, number)
    for shape, found in by_shape.items():
        if len(set(found.values())) >= FEWEST:
            yield shape, tuple(found)
