"""Units of a prompt: the smallest pieces that a query can be about, such as a line of a list or a sentence of a rule.

Queries are asked about units (ask/), a changed prompt is told from the old one by them, and the report says unit by
unit what an adapter knows.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pi_ray.prompt import FENCE, split_sections

Kind = Literal["item", "rule", "example"]
HAN = "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3041-\u3096\u30a1-\u30fa\u30fc\uff66-\uff9f"
WORD = re.compile(rf"[{HAN}{KANA}]|[^\W_{HAN}{KANA}]+")  # each character of a script without spaces is a word
MARK = r"[-*+•] |\d{1,3}[.)] |\|"  # that begins a line of a list or a table
ITEM = re.compile(rf"\s*(?:{MARK}|[^\s:][^:.!?]{{0,60}}:\s+\S)")
TABLE_RULE = re.compile(r"[\s|:+-]+")
# "billing: Q7, logins: Q2": three or more pairs on one line are items of a list
PAIRS = re.compile(r"[^,;:.]{1,40}: [^,;:.]{1,40}(?:[,;] [^,;:.]{1,40}: [^,;:.]{1,40}){2,}\.?")
SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=[^\W\d_a-z])|(?<=[.!?])\s*\n")
RARE = 2  # units that a word may stand in, and still tell them from others


@dataclass(frozen=True)
class Unit:
    """One piece of a prompt. `section`: the heading that it stands under, without its marks; "" for the instruction.

    Kinds: an item of a list or table, a rule (a sentence), an example (a fenced block).
    """

    section: str
    text: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.section}: {self.text}" if self.section else self.text


def find_units(template: str) -> list[Unit]:
    """The units of a prompt's text in their order, each once."""
    units: list[Unit] = []
    for section in split_sections(template):
        first, _, rest = section.partition("\n")
        heading = first.lstrip("# ").strip() if first.startswith("#") else ""
        units += (Unit(heading, text, kind) for text, kind in _split_section(rest if heading else section))
    return list(dict.fromkeys(units))


def _split_section(text: str) -> Iterator[tuple[str, Kind]]:
    for i, block in enumerate(re.split(rf"^{FENCE}(?:\n|\Z)", text, flags=re.M)):
        if i % 2:  # between two fences
            if block.strip():
                yield block.strip("\n"), "example"
            continue
        for paragraph in re.split(r"\n\s*\n", block):
            yield from _split_paragraph(paragraph.strip("\n"))


def _split_paragraph(paragraph: str) -> Iterator[tuple[str, Kind]]:
    lines = [line for line in paragraph.split("\n") if line.strip() and not line.startswith("#")]
    marked = [bool(ITEM.match(line)) for line in lines]
    if PAIRS.fullmatch(" ".join(map(str.strip, lines))):
        for pair in re.split(r"[,;] ", " ".join(map(str.strip, lines)).removesuffix(".")):
            yield pair, "item"
        return
    if sum(marked) < 2:
        for sentence in SENTENCE_END.split("\n".join(lines)):
            if WORD.search(sentence):
                yield " ".join(sentence.split()), "rule"
        return
    items: list[str] = []
    for line, is_item in zip(lines, marked, strict=True):
        if is_item or not items:
            items.append(line.strip())
        else:  # a line that goes on with the item above it
            items[-1] += " " + line.strip()
    for item in items:
        if not TABLE_RULE.fullmatch(item):
            yield re.sub(rf"^(?:{MARK})", "", item).strip(" |"), "item"


def words_of(text: str) -> list[str]:
    """The words of a text as units are compared by: lower case, without the s of a plural."""
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in WORD.findall(text.casefold())]


class UnitIndex:
    """Finds the units that a text is about, by the words that they share, rare ones first."""

    def __init__(self, units: Sequence[Unit]):
        self.units = list(units)
        self._places: dict[str, list[int]] = defaultdict(list)  # word -> the units that have it
        for place, unit in enumerate(self.units):
            for word in dict.fromkeys(words_of(str(unit))):
                self._places[word].append(place)

    def scores(self, text: str) -> list[float]:
        """For each unit the sum over the words that it shares with the text of log(units / units with the word)."""
        return self._sum(self._shared(text))

    def touched(self, text: str) -> list[int]:
        """The places of the units that share a rare word with the text, the nearest first."""
        shared = self._shared(text)
        scores, found = self._sum(shared), {i for places in shared if len(places) <= RARE for i in places}
        return sorted(found, key=lambda i: (-scores[i], i))

    def best(self, text: str) -> int | None:
        """The place of the unit that is nearest to the text; None where no unit shares a telling word with it."""
        scores = self.scores(text)
        best = max(range(len(scores)), key=scores.__getitem__, default=None)
        return best if best is not None and scores[best] > 0 else None

    def _sum(self, shared: Sequence[Sequence[int]]) -> list[float]:
        scores = [0.0] * len(self.units)
        for places in shared:
            for place in places:
                scores[place] += math.log(len(self.units) / len(places))
        return scores

    def _shared(self, text: str) -> list[list[int]]:
        """For each word that the text shares with units, the places of these."""
        return [self._places[word] for word in dict.fromkeys(words_of(text)) if word in self._places]
