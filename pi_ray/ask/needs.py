"""Which units of a prompt a labelled row needs, the most telling first: of these a writer learns to write its query."""

from collections import Counter
from collections.abc import Sequence
from random import Random

from pi_ray.protocols import Row
from pi_ray.units import Unit, UnitIndex, words_of

TAUGHT = 2  # units of a row, the most telling ones, from which a writer learns


def touched_units(rows: Sequence[Row], index: UnitIndex) -> list[list[int]]:
    """For each row the places of the units that share a rare word with its query or answer, the nearest first."""
    return [index.touched(f"{row.query}\n{row.answer}") for row in rows]


def needed_units(rows: Sequence[Row], touched: Sequence[list[int]], index: UnitIndex) -> list[list[int]]:
    """For each row the places of the units that it needs; none where it shares no telling word with any.

    A row needs what links its query with its answer: "checkout: r9" for a query that says checkout and an answer that
    says r9. Without such a unit, it needs those whose rare words it has (`touched_units`). Units that few rows need
    tell most.
    """
    found = [
        [unit for unit in units if _links(index.units[unit], row)] or units
        for row, units in zip(rows, touched, strict=True)
    ]
    count = Counter(unit for units in found for unit in units)
    return [sorted(units, key=lambda unit: (count[unit], unit)) for units in found]


def _links(unit: Unit, row: Row) -> bool:
    words, asked, given = (set(words_of(text)) for text in (str(unit), row.query, row.answer))
    return bool(words & asked and words & (given - asked))


class Partners:
    """Chooses the second unit of a query about two: from a section that rows need beside the first one's; where there
    are no rows, from any other section.
    """

    def __init__(self, index: UnitIndex, needed: Sequence[Sequence[int]]):
        self._sections: dict[str, list[int]] = {}
        for place, unit in enumerate(index.units):
            self._sections.setdefault(unit.section, []).append(place)
        self._section_of = [unit.section for unit in index.units]
        self._together: dict[str, list[str]] = {}
        for units in needed:
            sections = list(dict.fromkeys(self._section_of[unit] for unit in units[:TAUGHT]))
            for one in sections:  # also a section that is needed alone
                self._together.setdefault(one, []).extend(other for other in sections if other != one)

    def choose(self, unit: int, random: Random) -> int | None:
        """A unit that goes with this one; None where it is the only one."""
        own = self._section_of[unit]
        free = [] if self._together else [section for section in self._sections if section != own]
        sections = self._together.get(own) or free or [own]
        others = [other for other in self._sections[random.choice(sections)] if other != unit]
        return random.choice(others) if others else None
