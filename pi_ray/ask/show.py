"""Output of `pi-ray ask`: the units, how often each is touched before and after, examples, and what was left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pi_ray.run.directory import RunDir
from pi_ray.run.queries import Asked, read_queries

EXAMPLES = 2  # of each unit
NOT_WRITTEN = "–"  # in a cell whose kind of query the writer does not write
UNIT_WIDTH = 60


def print_queries(run: RunDir, manifest: Mapping[str, Any], console: Console) -> None:
    """Print what was asked. `manifest` is that of the artifact queries/."""
    queries = read_queries(run)
    console.print(_matrix(manifest, queries))
    for line in summarise_asking(manifest):
        console.print(Text(line))


def _matrix(manifest: Mapping[str, Any], queries: Sequence[Asked]) -> Table:
    """A line for each unit: rows and logged queries that touch it, generated queries of each kind, examples."""
    coverage = manifest["coverage"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("unit", max_width=UNIT_WIDTH)
    for name in ("before", *coverage["kinds"]):
        table.add_column(name, justify="right")
    table.add_column("such as")
    examples: dict[int, list[str]] = {}
    for asked in queries:
        examples.setdefault(asked.units[0], []).append(asked.query)
    for place, (unit, before) in enumerate(zip(manifest["units"], manifest["touched_before"], strict=True)):
        counts = (NOT_WRITTEN if n is None else str(n) for n in coverage["matrix"][place])
        shown = "\n".join(examples.get(place, [])[:EXAMPLES])
        table.add_row(Text(unit), str(before), *counts, Text(shown))
    return table


def summarise_asking(manifest: Mapping[str, Any]) -> list[str]:
    """Say in sentences what was written, kept and left out, and which units have no query."""
    kept, matrix = manifest["queries"], manifest["coverage"]["matrix"]
    reasons = {name: n for name, n in manifest["filters"].items() if name != "kept"}
    more = {"more than ask.queries": manifest["filters"]["kept"] - kept}
    left = ", ".join(f"{n} {name}" for name, n in {**reasons, **more}.items() if n)
    silent = [unit for unit, row in zip(manifest["units"], matrix, strict=True) if not any(row)]
    fresh = [i for i, before in enumerate(manifest["touched_before"]) if not before]
    covered = sum(any(matrix[i]) for i in fresh)
    lines = [
        f"{kept:,} queries kept of {manifest['written']:,} that the writer ({manifest['writer']}) wrote in "
        f"{manifest['seconds']:.0f} s; left out: {left or 'none'}.",
        f"Units: {len(matrix)}, {len(fresh)} of them in no labelled row or logged query; {covered} of these have "
        "queries now.",
    ]
    if silent:
        lines.append(f"No query about {len(silent)}: {'; '.join(silent)}")
    return lines
