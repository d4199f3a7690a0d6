"""Held-out queries: a few that the teacher answers and no student learns from, so that it can be asked what it knows.

They are chosen by the prompt's units, so that few of them ask about much of it.
"""

from collections import Counter
from collections.abc import Sequence

from pi_ray.run.artifact import digest
from pi_ray.units import UnitIndex

MOST_OF_UNIT = 4  # queries that are held out for one unit; those for others may ask about it too
ONE_IN = 4  # of the queries about a unit, at most one in so many is held out: the others teach it
MOST_TEXTS = 10_000  # among which queries are chosen


def choose_held_out(units: UnitIndex, texts: Sequence[str], share: float) -> list[int]:
    """The places of the texts (a query and its answer each) to hold out, at most `share` of all of them, in order.

    Every unit gets its first held-out text before any gets a second. The choice depends on the texts alone, not on
    their order. A text that stands there twice is not held out, nor is one about a unit with fewer than ONE_IN texts.
    """
    touched, count = [units.touched(text) for text in texts], Counter(texts)
    about: dict[int, list[int]] = {}  # unit -> its texts
    for place in sorted(range(len(texts)), key=lambda n: digest(texts[n])):
        for unit in touched[place]:
            about.setdefault(unit, []).append(place)
    held, chosen = Counter[int](), set[int]()

    def can_hold(place: int) -> bool:
        full = (held[unit] >= len(about[unit]) // ONE_IN for unit in touched[place])
        return place not in chosen and count[texts[place]] == 1 and not any(full)

    for turn in range(1, MOST_OF_UNIT + 1):
        for unit in sorted(about):
            if len(chosen) >= int(share * len(texts)):
                return sorted(chosen)
            found = next(filter(can_hold, about[unit]), None) if held[unit] < turn else None
            if found is not None:
                chosen.add(found)
                held.update(touched[found])
    return sorted(chosen)
