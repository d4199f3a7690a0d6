"""Requests to a writer: what it is asked to write about which units, round by round, until every cell is covered."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from pi_ray.ask.coverage import Cell, Coverage
from pi_ray.ask.needs import Partners
from pi_ray.config import AskKind
from pi_ray.protocols import Row
from pi_ray.run.artifact import digest
from pi_ray.units import Unit

SURPLUS = 2  # queries written for each that is missing, since filters drop about half
FRUITLESS = 2  # rounds without a query after which a cell is not asked about any more
AT_ONCE = 10  # queries of one reply
SHOWN = 6  # labelled queries that a prompted writer sees
LIST_MARK = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s+")
KINDS: dict[AskKind, str] = {
    "direct": "They must be about this part of the prompt, and can only be answered with what it says:",
    "reworded": "They must be about this part of the prompt without using its words, as people would who do not know "
        "how it is written:",
    "two": "Each of them must need both of these parts of the prompt:",
    "edge": "They must lie at the border of this rule: cases where it just applies or just does not, such as limits "
        "and exceptions:",
}


@dataclass(frozen=True)
class WriteRequest:
    """One prompt to a writer, and the seed of its reply, which holds `count` queries."""

    id: str
    units: tuple[int, ...]
    kind: AskKind
    count: int
    prompt: str
    seed: int

    @property
    def cell(self) -> Cell:
        """The cell that it is made for."""
        return Cell(self.units[0], self.kind)


class RequestPlanner:
    """Makes the requests of a round. Each depends on the seed, the round and what is missing alone."""

    def __init__(self, coverage: Coverage, partners: Partners, rows: Sequence[Row], seed: int, one_each: bool):
        self.coverage, self.partners, self.rows, self.seed = coverage, partners, rows, seed
        self.one_each = one_each  # whether a reply is one query, in the form that an adapter learned
        self._fruitless: dict[Cell, int] = {}  # rounds in which a cell got nothing

    def plan(self, number: int) -> list[WriteRequest]:
        """The requests of round `number`, for SURPLUS times what is missing."""
        requests = []
        for cell, missing in self.coverage.missing():
            if not self.coverage.counts[cell]:
                self._fruitless[cell] = self._fruitless.get(cell, -1) + 1
                if self._fruitless[cell] >= FRUITLESS:
                    continue
            left, part = missing * SURPLUS, 0
            while left > 0:
                count = 1 if self.one_each else min(left, AT_ONCE)
                name = f"{number}-{cell.unit}-{cell.kind}-{part}"
                seed = int(digest([self.seed, name])[:12], 16)
                if (units := self._units(cell.unit, cell.kind, seed)) is not None:
                    prompt = self._prompt(units, cell.kind, count, seed)
                    requests.append(WriteRequest(name, units, cell.kind, count, prompt, seed))
                left, part = left - count, part + 1
        return requests

    def _units(self, unit: int, kind: AskKind, seed: int) -> tuple[int, ...] | None:
        if kind != "two":
            return (unit,)
        other = self.partners.choose(unit, Random(seed))
        return None if other is None else (unit, other)

    def _prompt(self, units: Sequence[int], kind: AskKind, count: int, seed: int) -> str:
        about = [self.coverage.units[unit] for unit in units]
        if self.one_each:
            return adapter_prompt(about)
        shown = Random(seed).sample(self.rows, min(SHOWN, len(self.rows)))
        return instruction(about, kind, count, [row.query for row in shown])


def adapter_prompt(units: Iterable[Unit]) -> str:
    """The prompt with which the adapter that writes is trained and then asked: a line for each unit."""
    return "".join(f"Fact: {' '.join(str(unit).split())}\n" for unit in units) + "Request:"


def task_description(template: str) -> str:
    """The beginning of a prompted writer's prompt, equal for all requests."""
    return (
        "Below is the prompt of an application, between two lines of dashes. People send the application messages, and "
        f"it answers each of them by this prompt.\n\n-----\n{template}\n-----"
    )


def instruction(units: Sequence[Unit], kind: AskKind, count: int, examples: Sequence[str]) -> str:
    """The end of a prompted writer's prompt: units, kind and number of the messages, and examples."""
    sent = ["Messages that people have sent:", "\n".join(f"- {' '.join(example.split())}" for example in examples)]
    parts = [
        f"Write {count} different messages, as people would send them to the application. {KINDS[kind]}",
        "\n".join(f"- {unit}" for unit in units),
        *(sent if examples else []),
        "Write each message on a line of its own, without numbers, quotation marks or any other text. Do not write "
        "answers, and do not write what only the prompt tells, such as codes.",
    ]
    return "\n\n".join(parts)


def parse_reply(text: str, count: int) -> Iterator[str]:
    """The queries of a reply: the text itself where one was asked for, else its lines without marks of a list."""
    if count == 1:
        yield text.strip()
        return
    for line in text.splitlines():
        if query := LIST_MARK.sub("", line).strip().strip('"“”').strip():
            yield query
