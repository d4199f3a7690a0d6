"""Knowledge of an adapter as people read it: a line for each unit of the prompt, on the page and on the terminal."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console

from pi_ray.evaluate.knowledge import AnsweredQuestion, Knowledge, Verdict
from pi_ray.report.summary import terminal_table

HEAD = ("Rows", "Queries", "Teacher sure", "Adapter agrees")
MARKS: dict[Verdict, str] = {"not known": "✗", "teacher unsure": "?", "known": "✓", "not asked": "–"}
MOST_LINES = 60  # units that the page shows at once; the others unfold
MOST_NAME = 100  # characters of a unit on the terminal
MOST_SHOWN = 5  # unknown units of which the terminal shows an example


class KnowledgeLine(NamedTuple):
    """A unit with its cells in the order of HEAD, and the questions that show what it was asked."""

    verdict: str
    name: str
    section: str
    text: str
    cells: tuple[str, str, str, str]
    examples: Sequence[AnsweredQuestion]


def knowledge_lines(knowledge: Knowledge) -> Iterator[KnowledgeLine]:
    """The lines of all units, the worst first."""
    for unit in knowledge.worst_first:
        sure = f"{unit.sure:,} of {unit.queries:,}" if unit.queries else "–"
        agreed = f"{unit.agreed:,} of {unit.asked:,}" if unit.asked else "–"
        cells = (f"{unit.rows:,}", f"{unit.queries:,}", sure, agreed)
        verdict = f"{MARKS[unit.verdict]} {unit.verdict}"
        yield KnowledgeLine(verdict, unit.name, unit.section, unit.text, cells, unit.examples)


def print_knowledge(knowledge: Knowledge, console: Console, everything: bool = False) -> None:
    """The sentence, a table of the units that are not known (or of all), and an example of each of the first ones.

    Control characters, which a text from elsewhere may hold, are not printed.
    """
    console.print(_printable(knowledge.sentence), markup=False)
    lines = [line for line in knowledge_lines(knowledge) if everything or line.verdict[0] in "✗?"]
    if not lines:
        return
    names = [_printable(f"{line.verdict}  {line.section or 'instruction'}: {line.text}")[:MOST_NAME] for line in lines]
    rows = [[name, *line.cells] for name, line in zip(names, lines, strict=True)]
    console.print(terminal_table("Units of the prompt, the worst first", ["", *HEAD], rows))
    for asked in [line.examples[0] for line in lines if line.examples][:MOST_SHOWN]:
        says = (asked.query, f"  the {asked.source} says: {asked.expected}", f"  the adapter says: {asked.answer}")
        console.print("\n".join(map(_printable, says)), markup=False)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def page_knowledge(knowledge: Knowledge | None) -> dict[str, object]:
    """The section of the page: its sentence, the first lines and the rest; empty where nothing was asked."""
    if knowledge is None or not knowledge.units:
        return {}
    lines = list(knowledge_lines(knowledge))
    return {"sentence": knowledge.sentence, "head": HEAD, "lines": lines[:MOST_LINES], "rest": lines[MOST_LINES:]}
