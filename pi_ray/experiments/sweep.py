"""A sweep of runs, such as a table of the paper: columns x seeds over one run file, each run differing in a few keys.

A baseline is a schedule, not code: template and examples kept throughout, template only, nothing at all. Columns share
one cache of compressed templates and, seed to seed, their preparation.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from pi_ray.config import INPUTS, Block, RunConfig, run_file
from pi_ray.errors import ConfigError
from pi_ray.run.artifact import digest
from pi_ray.run.directory import RunDir

PREFIX = "table."  # overrides that begin so are for the table file, the others for every run of it


class ColumnConfig(Block):
    """One column of the table: the keys in which its runs differ from the run file."""

    label: str
    paper: str = Field("", description="the paper's column that it stands for, as named under `paper`")
    trained: bool = Field(True, description="false: the base model with the prompt of the last phase")
    set: dict[str, Any] = Field({}, description="dotted keys of run.yaml: values")


class PaperConfig(Block):
    """The paper's own rows, printed beside the measured ones."""

    metric: str = ""
    columns: tuple[str, ...] = ()
    rows: dict[str, tuple[tuple[float, ...] | None, ...]] = Field(
        {}, description="model -> for each column [metric, tokens]; null where the paper has none"
    )


class SweepConfig(Block):
    """One table file."""

    table: str = Field(description="the name of the table, such as 4")
    title: str
    run: str = Field(description="run file that all columns start from, relative to this file")
    set: dict[str, Any] = Field({}, description="dotted keys of run.yaml that all columns share")
    metric: str = Field("", description="the metric of the table: exact_match, bleu, pass_at_1, ...; default: the "
        "first of the run file's task.metric, else exact_match")
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    columns: dict[str, ColumnConfig]
    mine: str = Field("promptintern", description="the column that the others are compared with")
    full: str = Field("", description="the column trained with the whole prompt, for the gap recovered")
    none: str = Field("", description="the column trained on the query alone, for the gap recovered")
    whole: str = Field("", description="the column whose tokens are 1.0x; default: `full`, or the column with most")
    only: tuple[str, ...] = Field((), description="run these columns alone")
    results: str = Field("results.json", description="file that the numbers are merged into, relative to this file")
    paper: PaperConfig = PaperConfig()

    @model_validator(mode="after")
    def _names(self) -> Self:
        named = [(key, getattr(self, key)) for key in ("mine", "full", "none", "whole")]
        for key, name in [*named, *(("only", name) for name in self.only)]:
            if name and name not in self.columns:
                raise ValueError(f"{key}: there is no column '{name}'; there are {', '.join(self.columns)}")
        return self


class SweepRun(NamedTuple):
    """One run of a sweep: a column with one seed."""

    column: str
    seed: int
    trained: bool
    config: RunConfig

    @property
    def directory(self) -> RunDir:
        return RunDir(self.config.root)


class Sweep(NamedTuple):
    """A table file, and what it makes of its run file."""

    config: SweepConfig
    base: RunConfig  # the run that all columns start from
    runs: tuple[SweepRun, ...]  # first seed first: a sweep that is stopped has one of every column before two of any
    source: Path

    def runs_of(self, column: str) -> list[SweepRun]:
        """The runs of a column, one for each seed."""
        return [r for r in self.runs if r.column == column]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a table file and the run file that it names. Raises ConfigError for mistakes in either, and in columns."""
    own = [o.removeprefix(PREFIX) for o in overrides if o.startswith(PREFIX)]
    config = run_file.validate_yaml(SweepConfig, run_file.read_run_file(path), str(path), own)
    base = run_file.load_run_file(path.parent / config.run, [o for o in overrides if not o.startswith(PREFIX)])
    typed = {o.partition("=")[0] for o in overrides}
    shared = {key: value for key, value in {"evaluate.baseline": False, **config.set}.items() if key not in typed}
    base = _replace_keys(base, shared, f"{path}: set")
    config = config.model_copy(update={"metric": _table_metric(config.metric, base, path)})
    return Sweep(config, base, tuple(_sweep_runs(config, base, path)), path)


def _table_metric(named: str, base: RunConfig, path: Path) -> str:
    """The metric by which columns are compared. Raises ConfigError for one that the runs do not have, and where only a
    score file knows its name.
    """
    keys = [metric.key for metric in base.task.metric] or ["exact_match"]
    if not (named or keys[0]):
        raise ConfigError(f"{path}: metric is missing; task.metric is a score file, so name the number that it gives")
    if named and base.task.metric and named not in keys and "" not in keys:
        raise ConfigError(f"{path}: metric '{named}' is none of the run's task.metric, which has {', '.join(keys)}")
    return named or keys[0]


def _sweep_runs(config: SweepConfig, base: RunConfig, path: Path) -> Iterator[SweepRun]:
    for seed in config.seeds:
        for name, column in config.columns.items():
            if config.only and name not in config.only:
                continue
            if not column.trained and seed != config.seeds[0]:
                continue  # the base model has no seed
            own = _replace_keys(base, column.set, f"{path}: columns.{name}.set")
            shared = {key: True for key in ("run_dir", "name", "evaluate", "serve", "cost", "store", "cluster")}
            settings = digest(own.model_dump(mode="json", exclude={**shared, "task": set(INPUTS)}))[:8]
            folder = base.root / "columns" / f"{name}-{settings}" / f"seed-{seed}"
            yield SweepRun(name, seed, column.trained, own.replace(run_dir=str(folder), **{"train.seed": seed}))


def _replace_keys(config: RunConfig, changes: dict[str, Any], where: str) -> RunConfig:
    try:
        return config.replace(**changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def share_preparation(runs: Sequence[SweepRun], run: SweepRun) -> None:
    """Give a run the preparation of the same column's other seeds, which is equal, as hard links."""
    prepared = (r.directory for r in runs if r.column == run.column and r.directory.phases.exists())
    source = next(prepared, None)
    if source is None or run.directory.phases.exists():
        return
    run.directory.root.mkdir(parents=True, exist_ok=True)
    for path in source.root.glob("neighbours.*"):
        target = run.directory.root / path.name
        target.unlink(missing_ok=True)
        _link(path, target)
    for name in ("queries", "rows", "templates", "phases"):  # phases last: where they are, all is
        target = getattr(run.directory, name)
        shutil.rmtree(target, ignore_errors=True)  # of a copy that was cut short
        if getattr(source, name).exists():
            shutil.copytree(getattr(source, name), target, copy_function=_link)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
