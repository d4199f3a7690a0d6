"""A sweep of runs, such as a table of the paper: columns x seeds over one run file, each run differing in a few keys.

A baseline is a schedule, not code: template and examples kept throughout, template only, nothing at all. Columns share
one cache of compressed templates and, seed to seed, their preparation.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from pi_ray.config import INPUTS, Block, RunConfig, run_file
from pi_ray.errors import ConfigError
from pi_ray.run.artifact import digest
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import NOT_LEARNED

NOT_ASKED = {"confirmed", "poll_s", "train_price", "input_price", "output_price", "api_key_env"}  # of a service
PREFIX = "table."  # overrides that begin so are for the table file, the others for every run of it


class ColumnConfig(Block):
    """One column of the table: the keys in which its runs differ from the run file."""

    label: str
    paper: str = Field("", description="the paper's column that it stands for, as named under `paper`")
    trained: bool = Field(True, description="false: the base model with the prompt of the last phase")
    set: dict[str, Any] = Field({}, description="dotted keys of run.yaml: values")
    tasks: dict[str, dict[str, Any]] = Field({}, description="task -> keys that it has in place of those of `set`")


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
    run: str | dict[str, str] = Field(description="run file that all columns start from, relative to this file; or "
        "one for each task, of which table.task=NAME takes another than the first")
    task: str = ""
    models: str = Field("", description="file of base models, relative to this one: under `models` the dotted keys of "
        "run.yaml for each name; table.model=NAME takes another than the first")
    model: str = ""
    set: dict[str, Any] = Field({}, description="dotted keys of run.yaml that all columns share")
    metric: str | dict[str, str] = Field("", description="the metric of the table: exact_match, bleu, pass_at_1, ..., "
        "or one for each task; default: the first of the run file's task.metric, else exact_match")
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1)
    columns: dict[str, ColumnConfig]
    mine: str = Field("promptintern", description="the column that the others are compared with")
    full: str = Field("", description="the column trained with the whole prompt, for the gap recovered")
    none: str = Field("", description="the column trained on the query alone, for the gap recovered")
    whole: str = Field("", description="the column whose tokens are 1.0x; default: `full`, or the column with most")
    only: tuple[str, ...] = Field((), description="run these columns alone")
    results: str = Field("results.json", description="file that the numbers are merged into, relative to this file")
    paper: PaperConfig = PaperConfig()
    papers: dict[str, PaperConfig] = Field({}, description="task -> the paper's rows, where run has several tasks")

    @property
    def chosen_task(self) -> str:
        """The task by its name in `run`, "" where there is one run file. Raises ConfigError for one that is not there.
        """
        return "" if isinstance(self.run, str) else _choose("table.task", self.task, self.run)

    @property
    def run_file(self) -> str:
        return self.run if isinstance(self.run, str) else self.run[self.chosen_task]

    @model_validator(mode="after")
    def _names(self) -> Self:
        named = [(key, getattr(self, key)) for key in ("mine", "full", "none", "whole")]
        for key, name in [*named, *(("only", name) for name in self.only)]:
            if name and name not in self.columns:
                raise ValueError(f"{key}: there is no column '{name}'; there are {', '.join(self.columns)}")
        return self


class ModelsConfig(Block):
    """A file of base models."""

    models: dict[str, dict[str, Any]]


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
    metric: str  # by which its columns are compared
    runs: tuple[SweepRun, ...]  # first seed first: a sweep that is stopped has one of every column before two of any
    source: Path

    def runs_of(self, column: str) -> list[SweepRun]:
        """The runs of a column, one for each seed."""
        return [r for r in self.runs if r.column == column]


def is_table(path: Path) -> bool:
    """Whether a file is a table file, not a run file. Raises ConfigError for one that cannot be read."""
    return bool(re.search(r"^columns:", run_file.read_run_file(path), re.M))


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a table file and the run file that it names. Raises ConfigError for mistakes in either, and in columns."""
    own = [o.removeprefix(PREFIX) for o in overrides if o.startswith(PREFIX)]
    config = run_file.validate_yaml(SweepConfig, run_file.read_run_file(path), str(path), own)
    loaded = run_file.load_run_file(path.parent / config.run_file, [o for o in overrides if not o.startswith(PREFIX)])
    typed = {o.partition("=")[0] for o in overrides if not o.startswith(PREFIX)}
    model, of_model = _model_keys(config, path)
    every = {"evaluate.baseline": False, **config.set, **of_model}
    shared = {key: value for key, value in every.items() if not any(_is_inside(key, own) for own in typed)}
    base = _replace_keys(loaded, shared, f"{path}: set")
    again = {own: loaded.model_dump() for own in typed if any(_is_inside(own, key) for key in shared)}
    base = _replace_keys(base, {key: _value_at(dump, key) for key, dump in again.items()}, f"{path}: set")
    base = base.replace(run_dir=str(base.root / model)) if model and "run_dir" not in typed else base
    _refuse_hidden(config, typed, path)
    metric = _table_metric(_metric_of_task(config, path), base, path)
    config = config.model_copy(update={"paper": config.papers.get(config.chosen_task, config.paper)})
    return Sweep(config, base, metric, tuple(_sweep_runs(config, base, path)), path)


def _choose(key: str, name: str, named: Mapping[str, Any]) -> str:
    """`name`, or the first where it is empty. Raises ConfigError for one that is not there."""
    if name and name not in named:
        raise ConfigError(f"{key}: there is no '{name}'; there are {', '.join(named)}")
    return name or next(iter(named))


def _model_keys(config: SweepConfig, path: Path) -> tuple[str, dict[str, Any]]:
    """(name of the base model, the keys of its runs); nothing where a table has no choice of models."""
    if not config.models:
        if config.model:
            raise ConfigError(f"{path}: table.model would have no effect: the table names no file of models")
        return "", {}
    file = path.parent / config.models
    found = run_file.validate_yaml(ModelsConfig, run_file.read_run_file(file), str(file))
    name = _choose("table.model", config.model, found.models)
    return name, found.models[name]


def _refuse_hidden(config: SweepConfig, typed: Iterable[str], path: Path) -> None:
    """Raise ConfigError for an override that a column's own keys would hide."""
    for name, column in config.columns.items():
        for key in typed:
            keys = {*column.set, *column.tasks.get(config.chosen_task, ())}
            hidden = [own for own in keys if _is_inside(own, key) or _is_inside(key, own)]
            if hidden and (not config.only or name in config.only):
                raise ConfigError(
                    f"{path}: {key} would have no effect on column {name}, which sets {hidden[0]} itself; change it in "
                    "the file, or name other columns with table.only=[...]"
                )


def _is_inside(key: str, block: str) -> bool:
    """Whether a dotted key is `block` or lies in it."""
    return f"{key}.".startswith(f"{block}.")


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _metric_of_task(config: SweepConfig, path: Path) -> str:
    if isinstance(config.metric, str):
        return config.metric
    if config.chosen_task not in config.metric:
        raise ConfigError(f"{path}: metric names none for the task '{config.chosen_task}'")
    return config.metric[config.chosen_task]


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
            changes = column.tasks.get(config.chosen_task, column.set)
            own = _replace_keys(base, changes, f"{path}: columns.{name}.set")
            folder = base.root / "columns" / f"{name}-{digest(_settings(own))[:8]}" / f"seed-{seed}"
            yield SweepRun(name, seed, column.trained, own.replace(run_dir=str(folder), **{"train.seed": seed}))


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that a run's folder is named by: those that change no adapter stand at their defaults.

    So a table goes on in the same folders with another price, or once a service's costs are confirmed.
    """
    shared = {key: True for key in ("run_dir", "name", "evaluate", "serve", "cost", "store", "cluster")}
    found = config.model_dump(mode="json", exclude={**shared, "task": set(INPUTS)})
    usual = RunConfig(name="usual").model_dump(mode="json")
    for block, keys in (("train", NOT_LEARNED), ("closed", NOT_ASKED)):
        for key in keys:
            found[block].pop(key, None)
            found[block] |= {key: usual[block][key]} if key in usual[block] else {}
    return found


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
