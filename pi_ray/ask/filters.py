"""Filters of generated queries: what is thrown away, and why, counted.

A query is kept when it is new, neither evaluated nor labelled, about the units that it was asked for, and of a length
that queries have.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil

from pi_ray.ask.near import NearDuplicates
from pi_ray.config import AskKind
from pi_ray.retrieve.neighbours import normalised
from pi_ray.units import UnitIndex

LENGTHS = 2.0  # how much longer than the longest known query, or shorter than the shortest, one may be
SHORTEST, LONGEST = 3, 2000  # characters of a query where none is known
OWN_WORDS = ("direct", "two")  # kinds of queries that have words of their units


class QueryFilter:
    """Decides query by query, and remembers those that it kept."""

    def __init__(
        self, index: UnitIndex, least: float, held_out: Iterable[str], labelled: Iterable[str], log: Iterable[str],
    ):
        self.index = index
        known = {"evaluated": list(held_out), "labelled": list(labelled), "log": list(log)}
        self._exact = {normalised(query): name for name, queries in reversed(known.items()) for query in queries}
        self._near = {name: NearDuplicates(least) for name in (*known, "duplicate")}
        for name, queries in known.items():
            for query in queries:
                self._near[name].add(query, self._key(query))
        lengths = [len(query) for queries in (known["labelled"], known["log"]) for query in queries]
        self.shortest = min(lengths) / LENGTHS if lengths else SHORTEST
        self.longest = ceil(max(lengths) * LENGTHS) if lengths else LONGEST
        self.counts: Counter[str] = Counter()

    def keep(self, query: str, units: Sequence[int], kind: AskKind) -> bool:
        """Whether a query that was written about `units` is kept; `counts` has what became of it."""
        reason = self._reason(query, units, kind)
        self.counts[reason or "kept"] += 1
        if not reason:
            self._exact[normalised(query)] = "duplicate"
            self._near["duplicate"].add(query, self._key(query))
        return not reason

    def _reason(self, query: str, units: Sequence[int], kind: AskKind) -> str:
        """Why a query is not kept: a name in `counts`; "" for one that is."""
        if not query:
            return "about nothing that was asked for"
        if not self.shortest <= len(query) <= self.longest:
            return "too short or too long"
        if same := self._exact.get(normalised(query)):
            return same
        key = self._key(query)
        if near := next((name for name, texts in self._near.items() if texts.finds(query, key)), ""):
            return f"near {near}"
        return "" if self._is_about(query, units, kind) else "about another unit"

    def _is_about(self, query: str, units: Sequence[int], kind: AskKind) -> bool:
        """Whether no other unit of its section is nearer to the query than each of `units`, which also share words with
        it where the kind has them.
        """
        scores = self.index.scores(query)
        for unit in units:
            section = self.index.units[unit].section
            others = (s for i, s in enumerate(scores) if i not in units and self.index.units[i].section == section)
            if scores[unit] < max(others, default=0.0) or (kind in OWN_WORDS and not scores[unit]):
                return False
        return True

    def _key(self, query: str) -> frozenset[int]:
        """The units that a query tells from others: two queries about different ones are never duplicates."""
        return frozenset(self.index.touched(query))
