"""The search for a rate: a compressor is asked for more or less until the measured rate is the one that was wanted.

What it keeps counts by units (protect.py): protected ones stay whatever it says, and a unit is never cut.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pi_ray.compress import words
from pi_ray.compress.protection import Protection, Unit, split_units
from pi_ray.config import CompressConfig
from pi_ray.prompt import Template
from pi_ray.protocols import Compressor

TRIES = 8
AIM = 0.5  # stop at this share of the tolerance: a few more tries are cheap, and made once
NUMBER_SHARE = 0.75  # numbers are held while protected text takes at most this share of what may stay

Choice = list[list[bool]]  # of each part, which units stay


@dataclass(frozen=True)
class CompressedTemplate:
    """A template at one rate. `asked` and `achieved` are shares of `full_tokens`; `note` says in words what could not be kept."""

    text: str
    asked: float
    achieved: float
    tokens: int
    full_tokens: int
    note: str = ""


def count_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids) if text else 0


class _Part:
    """Instruction or one document, cut into units."""

    def __init__(self, text: str, config: CompressConfig):
        self.text = text
        self.words = words.word_spans(text)
        self.units = split_units(text, config)
        self.line_end = [bisect_left(self.units, _next_line(text, u.end), key=lambda v: v.start) for u in self.units]

    def choose(self, output: str, hold: Protection) -> list[bool]:
        """Which units stay: those that `output` keeps (at least half of their words) or that are held at least as strongly as `hold`."""
        kept = words.find_kept_words([self.text[a:b] for a, b in self.words], output.split())
        return [u.hold >= hold or s >= 0.5 for u, s in zip(self.units, _shares(self.words, kept, self.units), strict=True)]

    def render(self, chosen: Sequence[bool]) -> str:
        """The chosen units, and the labels of the lines that they stand in."""
        chosen = list(chosen)
        for i in reversed(range(len(chosen) - 1)):
            if self.units[i].label and not chosen[i]:
                chosen[i] = any(chosen[i + 1 : self.line_end[i]])
        return words.join_words(self.text, [(u.start, u.end) for u in self.units], chosen)


def _next_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _shares(spans: Sequence[words.Span], kept: Sequence[bool], parts: Sequence[Unit]) -> list[float]:
    """Of each unit, the share of its words that are kept."""
    share, at = [], 0
    for unit in parts:
        first = at
        while at < len(spans) and spans[at][0] < unit.end:
            at += 1
        share.append(sum(kept[first:at]) / max(at - first, 1))
    return share


class RateSearch:
    """One template, one rate. `run` returns the closest that was found, with a note where that is not close."""

    def __init__(self, compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig):
        self.compressor, self.template, self.rate, self.tokenizer, self.config = compressor, template, rate, tokenizer, config
        self.parts = [_Part(text, config) for text in (template.instruction, *template.documents) if text]
        self.full = count_tokens(tokenizer, template.text)

    def run(self) -> CompressedTemplate:
        """Narrow the compressor's rate by interpolation until the measured one is well within the tolerance."""
        nothing = [""] * len(self.parts)
        numbers, floor = self._draft(self._choose(nothing, Protection.NUMBER)), self._draft(self._choose(nothing, Protection.ALWAYS))
        hold, best = (Protection.NUMBER, numbers) if numbers.achieved <= NUMBER_SHARE * self.rate else (Protection.ALWAYS, floor)
        low, high = (0.0, best.achieved), (1.0, 1.0)  # (asked, achieved) on either side of the goal
        under: tuple[CompressedTemplate, Choice] | None = None  # the compressor's own on either side
        over: Choice | None = None
        tried: set[str] = set()
        stuck = False  # another rate gave the same text: halve the gap instead of creeping along it
        for _ in range(TRIES if floor.achieved < self.rate else 0):
            slope = 0.5 if stuck else (self.rate - low[1]) / max(high[1] - low[1], 1e-6)
            asked = low[0] + (high[0] - low[0]) * min(max(slope, 0.1), 0.9)
            choice = self._choose([self.compressor.compress(p.text, asked) for p in self.parts], hold)
            now = self._draft(choice)
            best = min(best if tried else now, now, key=self._error)
            if self._error(now) <= AIM * self.config.tolerance:
                break
            stuck = now.text in tried
            tried.add(now.text)
            if now.achieved > self.rate:
                high, over = (asked, now.achieved), choice
            else:
                low, under = (asked, now.achieved), (now, choice)
        if under and over and self._error(best) > self.config.tolerance:
            best = min(best, self._draft(self._between(*under, over)), key=self._error)
        return replace(best, note=self._note(best, floor, numbers))

    def _choose(self, outputs: Sequence[str], hold: Protection) -> Choice:
        return [p.choose(o, hold) for p, o in zip(self.parts, outputs, strict=True)]

    def _draft(self, choice: Choice) -> CompressedTemplate:
        text = "\n\n".join(t for t in (p.render(c) for p, c in zip(self.parts, choice, strict=True)) if t)
        tokens = count_tokens(self.tokenizer, text)
        return CompressedTemplate(text, self.rate, round(tokens / self.full, 4), tokens, self.full)

    def _error(self, made: CompressedTemplate) -> float:
        return abs(made.achieved - self.rate)

    def _between(self, draft: CompressedTemplate, under: Choice, over: Choice) -> Choice:
        """`under` and, of what only `over` keeps, the largest units that there is room for: the compressor's own rates lie too far apart."""
        choice, room = [list(c) for c in under], round(self.rate * self.full) - draft.tokens
        extra = [(p, u) for p in range(len(over)) for u in range(len(over[p])) if over[p][u] and not under[p][u]]
        for size, p, u in sorted(((self._size(self.parts[p], u), p, u) for p, u in extra), key=lambda item: -item[0]):
            if size <= room:
                choice[p][u] = True
                room -= size
        return choice

    def _size(self, part: _Part, unit: int) -> int:
        return count_tokens(self.tokenizer, " " + part.text[part.units[unit].start : part.units[unit].end])

    def _largest(self) -> float:
        """The largest unit that may be dropped, as a share of the template."""
        free = [(u.end - u.start, p, i) for p in self.parts for i, u in enumerate(p.units) if u.hold < Protection.ALWAYS]
        _, part, unit = max(free, key=lambda f: f[0], default=(0, None, 0))
        return self._size(part, unit) / self.full if part else 0.0

    def _note(self, best: CompressedTemplate, floor: CompressedTemplate, numbers: CompressedTemplate) -> str:
        """What a reader of the report must know about this template; empty when all went as asked."""
        notes, tolerance = [], self.config.tolerance
        if floor.achieved > best.asked + tolerance:
            notes.append(f"protected text alone is {floor.achieved:.0%} of the template")
        elif self._error(best) > tolerance:
            why = f": the largest piece that stays or goes as a whole (such as a row of a table) is {self._largest():.0%} of the template"
            notes.append(f"{self.config.name} came no closer than {best.achieved:.2f}{why if self._largest() > tolerance else ''}")
        have, all_ = (len(re.findall(r"\d+", text)) for text in (best.text, self.template.text))
        if self.config.protect_numbers and have < all_:
            notes.append(f"{have} of {all_} numbers kept; all of them would take {numbers.achieved:.0%} of the template")
        return "; ".join(notes)
