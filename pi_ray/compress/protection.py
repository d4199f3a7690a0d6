"""Protection: the spans of a template that compression keeps or drops whole, and how strongly each is protected.

Placeholders, code, JSON, URLs and the user's terms survive byte for byte. Numbers survive too as long as they leave
room for words: in a template that is mostly a table of codes, all numbers and no words would be useless.
"""

import json
import re
from collections.abc import Iterator
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
    """How strongly a span is protected: words are not, numbers while there is room for them, the rest always."""

    NONE = 0
    NUMBER = 1
    ALWAYS = 2


@dataclass(frozen=True)
class ProtectedSpan:
    """Characters [start, end) that are kept or dropped together. A label (`key:`) is kept where any of its line is."""

    start: int
    end: int
    protection: Protection
    is_label: bool = False


def split_spans(text: str, config: CompressConfig) -> list[ProtectedSpan]:
    """Words, table lines (half a row would be a wrong fact) and protected spans with their whole words, in order."""
    terms = [re.escape(t) for t in sorted(config.protect, key=len, reverse=True) if t.strip()]
    pattern = "|".join([CODE, URL, PLACEHOLDER, *terms])
    always = [*(m.span() for m in re.finditer(pattern, text, re.M | re.S)), *_json_spans(text)]
    labels = {m.span(1) for m in re.finditer(LABEL, text, re.M)}
    merged: list[words.Span] = []
    for start, end in sorted([*words.word_spans(text), *always, *labels, *_table_lines(text)]):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))

    def protection(start: int, end: int) -> Protection:
        if any(a < end and start < b for a, b in always):
            return Protection.ALWAYS
        has_number = config.protect_numbers and re.search(r"\d", text[start:end])
        return Protection.NUMBER if has_number else Protection.NONE

    return [ProtectedSpan(*span, protection(*span), span in labels) for span in merged]


def _json_spans(text: str) -> Iterator[words.Span]:
    """Outermost JSON objects and lists, without empty lists: `[ ]` is a box to tick."""
    decoder, at = json.JSONDecoder(), 0
    while opening := OPENING.search(text, at):
        at = opening.end()
        with suppress(ValueError, RecursionError):
            value, at = decoder.raw_decode(text, opening.start())
            if value != []:
                yield opening.start(), at


def _table_lines(text: str) -> list[words.Span]:
    """Headings and table lines: short lines in a run, or lines cut into cells by bars."""
    found: list[words.Span] = []
    run: list[words.Span] = []
    for line in re.finditer(r"[^\n]*\n?", text):  # the last match is empty and ends the last run
        content = line.group().strip()
        start = line.start() + len(line.group()) - len(line.group().lstrip())
        span = (start, start + len(content))
        if content.startswith("#") or content.count("|") >= 2:
            found.append(span)
        if 0 < len(content.split()) <= ROW_WORDS and not content.startswith("#"):
            run.append(span)
        else:
            found += run if len(run) >= ROW_LINES else []
            run = []
    return found
