"""The rows for a refresh after the prompt changed: those about the change, as the new prompt answers, and an anchor."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.prompt import Template
from pi_ray.protocols import UNLABELLED, Reject, Row, Task
from pi_ray.registry import tasks
from pi_ray.run.artifact import digest, digest_file
from pi_ray.run.row_store import StoredRows
from pi_ray.tasks.prompt_change import LabelCorrection, compare_prompts
from pi_ray.units import UnitIndex, find_units

TEMPLATE_FILE, QUERIES_FILE = "template.txt", "unlabelled.parquet"  # of the published adapter, in task.published
ANCHORS = 2  # rows that are replayed for each row about the change
FEWEST_ANCHORS = 96


@dataclass
class ChangeCounts:
    """Changes to the rows of all splits, and how many labelled rows and queries are trained on."""

    exchanged: int = 0
    dropped: int = 0
    about: Counter[str] = field(default_factory=Counter)  # split -> rows about the change
    anchors: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return self.about.total() + self.anchors.total()

    def __str__(self) -> str:
        labels = f"{self.exchanged} labels follow the new prompt now, {self.dropped} rows are dropped"
        return f"{labels}; {self.about.total()} rows and queries about the change, {self.anchors.total()} replayed"


class ChangedPromptTask:
    """A task whose prompt has changed since its adapter was published (`task.published`: a folder of it).

    Labels follow the new prompt (LabelCorrection). Training rows and queries are those about the change, and of the
    others ANCHORS times as many, chosen by their ids. Dev and test rows are all that can be corrected.
    """

    def __init__(self, config: TaskConfig):
        self.task: Task = tasks[config.name](config)
        self.folder, self.names_queries = Path(config.published), bool(config.queries)
        try:
            old = (self.folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DataError(f"{self.folder}: no {TEMPLATE_FILE}; 'pi-ray refresh' writes it, so begin again") from None
        new = self.task.template().text
        self.change = compare_prompts(old, new)
        self.correction, self.index = LabelCorrection(old, self.change), UnitIndex(find_units(new))
        self.fresh = {i for i, unit in enumerate(self.index.units) if unit in set(self.change.fresh)}

    def rows(self, split: str) -> Iterator[Row | Reject]:
        if split in ("train", UNLABELLED):
            yield from self._chosen(split)
            return
        yield from self._corrected(self.task.rows(split))

    def template(self) -> Template:
        return self.task.template()

    def score(self, row: Row, output: str) -> dict[str, float]:
        return self.task.score(row, output)

    def fingerprint(self) -> str:
        files = [self.folder / TEMPLATE_FILE, self.folder / QUERIES_FILE]
        return digest([self.task.fingerprint(), [digest_file(file) for file in files if file.is_file()]])

    def count(self) -> ChangeCounts:
        """Read all rows once."""
        found = ChangeCounts()
        for split in ("train", "dev", "test"):
            for row in self.task.rows(split):
                if isinstance(row, Row):
                    now = self.correction.correct(row)
                    found.dropped += now is None
                    found.exchanged += now is not None and now is not row
        for split in ("train", UNLABELLED):
            for row in self.rows(split):
                if isinstance(row, Row):
                    (found.about if self._is_about(row) else found.anchors)[split] += 1
        return found

    def unasked(self) -> list[str]:
        """The new and changed units that no training row or query is about."""
        rows = [row for split in ("train", UNLABELLED) for row in self.rows(split) if isinstance(row, Row)]
        touched = {i for row in rows for i in self.index.touched(f"{row.query}\n{row.answer}")}
        return [str(self.index.units[i]) for i in sorted(self.fresh - touched)]

    def _is_about(self, row: Row) -> bool:
        return not self.fresh.isdisjoint(self.index.touched(f"{row.query}\n{row.answer}"))

    def _chosen(self, split: str) -> Iterator[Row | Reject]:
        about, others = 0, list[str]()
        for row in self._following(split):
            if isinstance(row, Row) and self._is_about(row):
                about += 1
            elif isinstance(row, Row):
                others.append(row.id)
        anchors = set(nsmallest(max(ANCHORS * about, FEWEST_ANCHORS), others, key=digest))
        for row in self._following(split):
            if isinstance(row, Reject) or row.id in anchors or self._is_about(row):
                yield row

    def _following(self, split: str) -> Iterator[Row | Reject]:
        """The rows of a split with labels that follow the new prompt; of the queries also those that were generated.

        A run that generated all of its queries (task.queries names no file) has none of the task's own.
        """
        generated = split == UNLABELLED and (self.folder / QUERIES_FILE).is_file()
        known = set[str]()
        if self.names_queries or not generated:
            for row in self._corrected(self.task.rows(split)):
                known |= {row.id} if isinstance(row, Row) else set()
                yield row
        if generated:
            yield from (row for row in StoredRows(self.folder / QUERIES_FILE) if row.id not in known)

    def _corrected(self, rows: Iterable[Row | Reject]) -> Iterator[Row | Reject]:
        for row in rows:
            now = row if isinstance(row, Reject) else self.correction.correct(row)
            if now:
                yield now


def open_task(config: TaskConfig) -> Task:
    """The task of a run file, or where its prompt has changed since publishing, the rows for that."""
    return ChangedPromptTask(config) if config.published else tasks[config.name](config)
