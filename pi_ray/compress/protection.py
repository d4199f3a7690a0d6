"""What compression may not cut: units of a template that stay whole, and how strongly each is held.

Placeholders, code, JSON, URLs and the user's terms survive byte for byte. Numbers survive too as long as they leave room for words:
in a template that is mostly a table of codes, all numbers and nothing else would be useless. A number is never cut in half.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from pi_ray.compress import words
from pi_ray.config import CompressConfig

ITEM = r"(?:(?:[-*+]|\d+[.)]) +)?"  # of a list
CODE = rf"^[ \t]*{ITEM}(?:```|~~~).*?^[ \t]*(?:```|~~~)[^\n]*$|`[^`\n]+`"
PLACEHOLDER = r"\{\{\s*[\w.-]+\s*\}\}|\{[\w.-]+\}|<[A-Za-z_][\w.-]*>"
OPENING = re.compile(r"[{\[]")  # of JSON
URL = r"(?:https?|ftp)://[^\s<>\"')]+"
LABEL = rf"^[ \t]*({ITEM}[^\s:]+:)(?=[ \t]+\S)"
ROW_WORDS = 5  # a line of a table or list has at most this many words
ROW_LINES = 4  # and stands among at least this many such lines


class Protection(IntEnum):
    """How strongly a unit is held: words are free, numbers survive while there is room, the rest always."""

    FREE = 0
    NUMBER = 1
    ALWAYS = 2


@dataclass(frozen=True)
class Unit:
    """Characters [start, end) of a text that are kept or dropped together. A `label` (`key:` before the rest of a line) goes with its line."""

    start: int
    end: int
    hold: Protection
    label: bool = False


def split_units(text: str, config: CompressConfig) -> list[Unit]:
    """The text as units, in order, separated by white space.

    A unit is a word, or the words that a protected span joins, or a whole line of a table: half a row is a fact lost or made wrong.
    """
    always = [*(m.span() for m in re.finditer(_pattern(config), text, re.M | re.S)), *_json(text)]
    merged: list[list[int]] = []
    labels = {m.span(1) for m in re.finditer(LABEL, text, re.M)}
    for start, end in sorted([*words.word_spans(text), *always, *labels, *_rows(text)]):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [Unit(start, end, _hold(text[start:end], start, end, always, config), (start, end) in labels) for start, end in merged]


def _pattern(config: CompressConfig) -> str:
    terms = [re.escape(t) for t in sorted(config.protect, key=len, reverse=True) if t.strip()]
    return "|".join([CODE, URL, PLACEHOLDER, *terms])


def _json(text: str) -> Iterator[words.Span]:
    """Spans of JSON objects and lists that stand in no other. An empty list is none: `[ ]` is a box to tick."""
    decoder, at = json.JSONDecoder(), 0
    while opening := OPENING.search(text, at):
        at = opening.end()
        with suppress(ValueError, RecursionError):
            value, at = decoder.raw_decode(text, opening.start())
            if value != []:
                yield opening.start(), at


def _hold(piece: str, start: int, end: int, always: Sequence[words.Span], config: CompressConfig) -> Protection:
    if any(a < end and start < b for a, b in always):
        return Protection.ALWAYS
    return Protection.NUMBER if config.protect_numbers and re.search(r"\d", piece) else Protection.FREE


def _rows(text: str) -> list[words.Span]:
    """Spans of headings and of table lines: short lines in a run, or lines cut into cells by bars."""
    found, run = [], []
    for line in re.finditer(r"[^\n]*\n?", text):
        content = line.group().strip()
        start = line.start() + len(line.group()) - len(line.group().lstrip())
        span = (start, start + len(content))
        short = 0 < len(content.split()) <= ROW_WORDS
        if content.startswith("#") or content.count("|") >= 2:
            found.append(span)
        if short and not content.startswith("#"):
            run.append(span)
        else:
            found += run if len(run) >= ROW_LINES else []
            run = []
    return found + (run if len(run) >= ROW_LINES else [])
