"""Rate control: ask a compressor for more or less until the measured rate of a template is the one that was asked for.

The choice is made by spans (protection.py): protected ones stay whatever the compressor drops, and a span is never cut.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pi_ray.compress import words
from pi_ray.compress.protection import Protection, split_spans
from pi_ray.config import CompressConfig
from pi_ray.prompt import Template
from pi_ray.protocols import Compressor

TRIES = 8
AIM = 0.5  # stop at this share of the tolerance: a few more tries are cheap, and made once
NUMBER_SHARE = 0.75  # numbers stay while protected text takes at most this share of the rate

Choice = list[list[bool]]  # for each part, which of its spans stay


@dataclass(frozen=True)
class CompressedTemplate:
    """A template at one rate. `asked` and `achieved` are shares of `full_tokens`; `note` says what could not be met."""

    text: str
    asked: float
    achieved: float
    tokens: int
    full_tokens: int
    note: str = ""


def count_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids) if text else 0


class _Part:
    """The instruction or one document, cut into spans."""

    def __init__(self, text: str, config: CompressConfig):
        self.text = text
        self.words = words.word_spans(text)
        self.spans = split_spans(text, config)
        # for each span the index of the first one on a later line
        line_ends = [f"{text}\n".index("\n", u.end) for u in self.spans]
        self.next_line = [bisect_left(self.spans, end, key=lambda u: u.start) for end in line_ends]

    def span_text(self, span: int) -> str:
        return self.text[self.spans[span].start : self.spans[span].end]

    def choose(self, output: str, level: Protection) -> list[bool]:
        """Which spans stay: half of their words stand in `output`, or their protection is at least `level`."""
        kept = words.find_kept_words([self.text[a:b] for a, b in self.words], output.split())
        chosen, at = [], 0
        for span in self.spans:
            first = at
            while at < len(self.words) and self.words[at][0] < span.end:
                at += 1
            chosen.append(span.protection >= level or 2 * sum(kept[first:at]) >= max(at - first, 1))
        return chosen

    def render(self, chosen: Sequence[bool]) -> str:
        """The chosen spans, and the labels of the lines that they stand in."""
        chosen = list(chosen)
        for i in reversed(range(len(chosen) - 1)):
            if self.spans[i].is_label and not chosen[i]:
                chosen[i] = any(chosen[i + 1 : self.next_line[i]])
        return words.join_words(self.text, [(u.start, u.end) for u in self.spans], chosen)


class RateSearch:
    """Compresses one template at one rate."""

    def __init__(
        self, compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig
    ):
        self.compressor, self.template, self.rate = compressor, template, rate
        self.tokenizer, self.config = tokenizer, config
        self.parts = [_Part(text, config) for text in (template.instruction, *template.documents) if text]
        self.full = count_tokens(tokenizer, template.text)
        self.drafts: dict[str, CompressedTemplate] = {}  # text -> its result: many rates give the same text

    def run(self) -> CompressedTemplate:
        """The closest result that interpolation of the compressor's rate finds, with a note where it is not close."""
        nothing = [""] * len(self.parts)
        numbers = self._draft(self._choose(nothing, Protection.NUMBER))
        minimum = self._draft(self._choose(nothing, Protection.ALWAYS))
        keeps_numbers = numbers.achieved <= NUMBER_SHARE * self.rate
        level, best = (Protection.NUMBER, numbers) if keeps_numbers else (Protection.ALWAYS, minimum)
        low, high = (0.0, best.achieved), (1.0, 1.0)  # (asked, achieved) on either side of the goal
        under: tuple[CompressedTemplate, Choice] | None = None  # the compressor's results on either side
        over: Choice | None = None
        choices: dict[tuple[str, ...], Choice] = {}  # what the compressor returned -> which spans stay
        tried: set[str] = set()
        stuck = False  # another rate gave the same text: halve the gap instead of creeping along it
        for _ in range(TRIES if minimum.achieved < self.rate else 0):
            slope = 0.5 if stuck else (self.rate - low[1]) / max(high[1] - low[1], 1e-6)
            asked = low[0] + (high[0] - low[0]) * min(max(slope, 0.1), 0.9)
            outputs = self._compress(asked)
            if outputs not in choices:
                choices[outputs] = self._choose(outputs, level)
            choice = choices[outputs]
            draft = self._draft(choice)
            best = min(best if tried else draft, draft, key=self._error)
            if self._error(draft) <= AIM * self.config.tolerance:
                break
            stuck = draft.text in tried
            tried.add(draft.text)
            if draft.achieved > self.rate:
                high, over = (asked, draft.achieved), choice
            else:
                low, under = (asked, draft.achieved), (draft, choice)
        if under and over and self._error(best) > self.config.tolerance:
            best = min(best, self._draft(self._between(*under, over)), key=self._error)
        return replace(best, note=self._note(best, minimum, numbers))

    def _compress(self, rate: float) -> tuple[str, ...]:
        """The text that the compressor leaves of each part."""
        return tuple(self.compressor.compress(part.text, rate) for part in self.parts)

    def _choose(self, outputs: Sequence[str], level: Protection) -> Choice:
        return [p.choose(o, level) for p, o in zip(self.parts, outputs, strict=True)]

    def _draft(self, choice: Choice) -> CompressedTemplate:
        return self._result("\n\n".join(filter(None, self._texts(choice))))

    def _texts(self, choice: Choice) -> list[str]:
        """The text that stays of each part."""
        return [part.render(chosen) for part, chosen in zip(self.parts, choice, strict=True)]

    def _result(self, text: str) -> CompressedTemplate:
        if text not in self.drafts:
            tokens = count_tokens(self.tokenizer, text)
            achieved = round(tokens / self.full, 4)
            self.drafts[text] = CompressedTemplate(text, self.rate, achieved, tokens, self.full)
        return self.drafts[text]

    def _error(self, result: CompressedTemplate) -> float:
        return abs(result.achieved - self.rate)

    def _between(self, draft: CompressedTemplate, under: Choice, over: Choice) -> Choice:
        """`under` and the largest spans of `over` that there is room for: no rate of the compressor lies between."""
        choice, room = [list(c) for c in under], round(self.rate * self.full) - draft.tokens
        extra = [(p, u) for p, spans in enumerate(over) for u, stays in enumerate(spans) if stays and not under[p][u]]
        sizes = {(p, u): self._size(self.parts[p], u) for p, u in extra}
        for p, u in sorted(extra, key=lambda place: -sizes[place]):
            if sizes[p, u] <= room:
                choice[p][u] = True
                room -= sizes[p, u]
        return choice

    def _size(self, part: _Part, span: int) -> int:
        return count_tokens(self.tokenizer, " " + part.span_text(span))

    def _largest(self) -> float:
        """The largest span that may be dropped, as a share of the template."""
        spans = ((p, i) for p in self.parts for i, u in enumerate(p.spans) if u.protection < Protection.ALWAYS)
        found = max(spans, key=lambda place: len(place[0].span_text(place[1])), default=None)
        return self._size(*found) / self.full if found else 0.0

    def _note(self, best: CompressedTemplate, minimum: CompressedTemplate, numbers: CompressedTemplate) -> str:
        """A note for the report about unmet rates and dropped numbers; empty when all went as asked."""
        notes, tolerance = [], self.config.tolerance
        if minimum.achieved > best.asked + tolerance:
            notes.append(f"protected text alone is {minimum.achieved:.0%} of the template")
        elif self._error(best) > tolerance:
            note = f"{self.config.name} came no closer than {best.achieved:.2f}"
            if (largest := self._largest()) > tolerance:
                note += ": the largest piece that stays or goes as a whole (such as a row of a table) is "
                note += f"{largest:.0%} of the template"
            notes.append(note)
        kept, total = (len(re.findall(r"\d+", text)) for text in (best.text, self.template.text))
        if self.config.protect_numbers and kept < total:
            notes.append(
                f"{kept} of {total} numbers kept; all of them would take {numbers.achieved:.0%} of the template"
            )
        return "; ".join(notes)
