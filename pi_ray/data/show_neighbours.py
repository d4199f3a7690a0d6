"""`pi-ray neighbours`: prints a row and the examples that it is given, with their scores."""

from difflib import get_close_matches
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from pi_ray.config import RunConfig
from pi_ray.data.find_neighbours import SCORES, read_facts, summarise_facts
from pi_ray.errors import DataError
from pi_ray.protocols import Row
from pi_ray.run.artifact import is_current
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import read_range


def show_neighbours(config: RunConfig, row_id: str, split: str, console: Console) -> None:
    """Print the row and its examples, best first. Raises DataError for an unknown row, or an unprepared run."""
    run = RunDir(config.root)
    facts = read_facts(run)
    cure = "run 'pi-ray prepare' with this run.yaml, and with schedule.shots above 0"
    if not facts or not run.neighbours.exists():
        raise DataError(f"{run.neighbours}: not there; {cure}")
    if not is_current(run.rows, facts.get("fingerprint", "")):
        raise DataError(f"{run.neighbours}: the rows were written anew since; {cure}")
    found = _neighbours(run, row_id, split)
    row = _rows(run, found["split"], [row_id])[row_id]
    bank = _rows(run, "train", found["neighbours"])
    by = facts.get("by", config.retrieve.by) if found["split"] == "train" else "query"
    score = SCORES[facts.get("score", "bleu")]
    say = lambda *parts: console.print(Text.assemble(*parts))  # noqa: E731  user text is never read as markup
    say((f"{row.id}", "bold"), f"  {found['split']}; its examples are chosen by the {by}")
    _print(row, "", say)
    for rank, (name, value) in enumerate(zip(found["neighbours"], found["scores"], strict=True), start=1):
        say("\n", (f"{rank}. {score} {value:.1f}", "bold"), f"  {name}")
        _print(bank[name], "   ", say)
    if not found["neighbours"]:
        say("\nThe bank has no example for it.")
    if "method" in facts:
        everything = f"All rows: {summarise_facts(facts, config.retrieve.by)}"
        say("\n", (f"{everything}. In a prompt the best stands last, next to the query.", "dim"))


def _print(row: Row, indent: str, say: Any) -> None:
    for name, text in (("query ", row.query), ("answer", row.answer)):
        say((f"{indent}{name} ", "dim"), text.replace("\n", f"\n{indent}{' ' * len(name)} "))


def _neighbours(run: RunDir, row_id: str, split: str) -> dict[str, Any]:
    table = read_range(run.neighbours)
    if split:
        table = table.filter(pc.equal(table["split"], split))
    found = table.filter(pc.equal(table["id"], row_id)).to_pylist()
    if not found:
        close = get_close_matches(row_id, table["id"].to_pylist()[:100_000], n=3, cutoff=0.5)
        cure = f"did you mean {' or '.join(close)}?" if close else f"its ids stand in {run.rows}"
        raise DataError(f"no row '{row_id}' in {split or 'this run'}; {cure}")
    return found[0]


def _rows(run: RunDir, split: str, ids: list[str]) -> dict[str, Row]:
    wanted = set(ids)
    return {row.id: row for row in run.rows_of(split) if row.id in wanted}
