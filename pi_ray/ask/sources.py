"""Sources of asking: the template, and the queries that there are already."""

from collections.abc import Sequence
from dataclasses import dataclass

from pi_ray.config import RunConfig
from pi_ray.data.ingest import check_splits, read_splits
from pi_ray.errors import DataError
from pi_ray.protocols import SPLITS, UNLABELLED, Row, Task
from pi_ray.registry import tasks
from pi_ray.run.answered import labelled_splits
from pi_ray.run.artifact import digest
from pi_ray.run.directory import RunDir
from pi_ray.units import Unit, find_units


@dataclass(frozen=True)
class Sources:
    """`template` is the whole text; `held_out` are queries that must never be asked, such as those of dev and test
    rows; `log` are other queries that need not be asked again.
    """

    template: str
    labelled: Sequence[Row] = ()
    held_out: Sequence[str] = ()
    log: Sequence[str] = ()

    def units(self) -> list[Unit]:
        """The units of the template. Raises DataError where there are none."""
        if units := find_units(self.template):
            return units
        raise DataError("task.queries generate: the template says nothing that a query could be about; write the "
            "prompt into task.template, or name a file of queries with task.queries")

    def fingerprint(self) -> str:
        labelled = [[row.query, row.answer] for row in self.labelled]
        return digest([self.template, labelled, list(self.held_out), list(self.log)])


def task_sources(config: RunConfig) -> Sources:
    """The sources of a run that generates queries: its task's rows, split as preparation will split them.

    Raises DataError for unfit rows.
    """
    task: Task = tasks[config.task.name](config.task)
    unlabelled = [UNLABELLED] if config.task.queries else []
    if config.answers_first:  # there may be no labelled rows at all
        found, _ = read_splits(task, [*labelled_splits(config), *unlabelled])
        splits: dict[str, list[Row]] = {**{split: [] for split in SPLITS}, **found}
    else:
        splits, rejects = read_splits(task, [*SPLITS, *unlabelled])
        check_splits(splits, rejects, config.task, RunDir(config.root))
    held_out = [row.query for split in ("dev", "test") for row in splits[split]]
    return Sources(task.template().text, splits["train"], held_out, [row.query for row in splits.get(UNLABELLED, ())])
