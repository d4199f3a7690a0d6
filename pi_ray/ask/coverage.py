"""Coverage: how many queries there are of each unit and kind, what is missing, and what cannot be written."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

from pi_ray.config import AskKind
from pi_ray.units import Unit


class Cell(NamedTuple):
    """One cell of the matrix."""

    unit: int
    kind: AskKind


class Coverage:
    """The matrix of units and kinds. Its cells are what the writer can write: rules alone have an edge, and an adapter
    writes about units of `sections` alone, of which labelled rows have shown it some.
    """

    def __init__(
        self, units: Sequence[Unit], kinds: Sequence[AskKind], queries: int, sections: Collection[str] | None = None
    ):
        self.units, self.kinds, self.sections = units, kinds, sections
        self.cells = [Cell(i, kind) for i in range(len(units)) for kind in kinds if self.fits(i, kind)]
        self.target = ceil(queries / max(1, len(self.cells)))  # queries of each cell
        self.counts: Counter[Cell] = Counter()

    def fits(self, unit: int, kind: AskKind) -> bool:
        if self.sections is not None and self.units[unit].section not in self.sections:
            return False
        return {"edge": self.units[unit].kind == "rule", "two": len(self.units) > 1}.get(kind, True)

    def add(self, units: Iterable[int], kind: AskKind) -> None:
        """Count a query about these units."""
        self.counts.update(Cell(unit, kind) for unit in units)

    def missing(self) -> Iterator[tuple[Cell, int]]:
        """The cells that have too few queries, and how many they lack."""
        return ((cell, self.target - n) for cell in self.cells if (n := self.counts[cell]) < self.target)

    def facts(self) -> dict[str, Any]:
        """The matrix as JSON: for each unit a number for each kind, null where the writer writes no such query."""
        matrix = [[self.counts[Cell(i, k)] if self.fits(i, k) else None for k in self.kinds]
                  for i in range(len(self.units))]
        return {"kinds": list(self.kinds), "target": self.target, "matrix": matrix}
