"""A family of runs, such as a table of the paper: columns x seeds over one run file, each a run of its own that differs in a few keys.

A baseline is a schedule, not code: template and examples kept throughout, template only, nothing at all. Columns of a family share one
bank of compressed templates and, seed to seed, their preparation. What is done is skipped, so that a family goes on where it was stopped.
Layout and statistics are in table.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pi_ray.config import INPUTS, Block, RunConfig, run_file
from pi_ray.errors import ConfigError
from pi_ray.run.artifact import digest
from pi_ray.run.directory import RunDir

PREFIX = "table."  # overrides that begin so are for the table file, the others for every run of it


class ColumnConfig(Block):
    """One column: the keys in which its runs differ from the run file."""

    label: str
    paper: str = Field("", description="the paper's column that it stands for, as it is called under `paper`")
    trained: bool = Field(True, description="false: the base model with the prompt of the last phase")
    set: dict[str, Any] = Field({}, description="dotted keys of run.yaml: values")


class PaperConfig(Block):
    """The paper's own rows, printed beside: model -> one cell for each column, [metric, tokens]."""

    metric: str = ""
    columns: tuple[str, ...] = ()
    rows: dict[str, tuple[tuple[float, ...] | None, ...]] = Field({}, description="model -> for each column [metric, tokens]; null where the paper has none")


class FamilyConfig(Block):
    """One table file."""

    table: str = Field(description="what it is called, such as 4")
    title: str
    run: str = Field(description="run file that all columns start from, relative to this file")
    set: dict[str, Any] = Field({}, description="dotted keys of run.yaml that all columns share")
    metric: str = Field("exact_match", description="the metric of the table: exact_match, bleu, pass_at_1, ...")
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
    def _names(self) -> FamilyConfig:
        for key in ("mine", "full", "none", "whole"):
            if getattr(self, key) and getattr(self, key) not in self.columns:
                raise ValueError(f"{key}: there is no column '{getattr(self, key)}'; there are {', '.join(self.columns)}")
        if unknown := set(self.only) - set(self.columns):
            raise ValueError(f"only: there is no column '{min(unknown)}'; there are {', '.join(self.columns)}")
        return self


@dataclass(frozen=True)
class Member:
    """One run of the family."""

    column: str
    seed: int
    trained: bool
    config: RunConfig

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.root)


@dataclass(frozen=True)
class Family:
    config: FamilyConfig
    base: RunConfig
    members: tuple[Member, ...]
    source: Path

    def of(self, column: str) -> list[Member]:
        """The runs of a column, one for each seed."""
        return [m for m in self.members if m.column == column]


def load(path: Path, overrides: Sequence[str] = ()) -> Family:
    """Read a table file and the run file it names. Raises ConfigError for mistakes in either, and in a column's keys."""
    own = [o.removeprefix(PREFIX) for o in overrides if o.startswith(PREFIX)]
    config = run_file.check(FamilyConfig, run_file.read(path), str(path), own)
    base = run_file.load(path.parent / config.run, [o for o in overrides if not o.startswith(PREFIX)])
    base = _set(base, {"evaluate.baseline": False, **config.set}, f"{path}: set", overrides)
    return Family(config, base, tuple(_members(config, base, path)), path)


def _members(config: FamilyConfig, base: RunConfig, path: Path) -> Iterator[Member]:
    for seed in config.seeds:
        for name, column in config.columns.items():
            if config.only and name not in config.only:
                continue
            if not column.trained and seed != config.seeds[0]:
                continue  # the base model has no seed
            own = _set(base, column.set, f"{path}: columns.{name}.set")
            other = {"run_dir": True, "name": True, "evaluate": True, "serve": True, "cost": True, "store": True, "cluster": True, "task": set(INPUTS)}
            same = digest(own.model_dump(mode="json", exclude=other))[:8]
            yield Member(name, seed, column.trained, own.replace(run_dir=str(base.root / "columns" / f"{name}-{same}" / f"seed-{seed}"), **{"train.seed": seed}))


def _set(config: RunConfig, changes: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """`config` with dotted keys changed, but for those that the command line has set."""
    typed = {o.partition("=")[0] for o in overrides}
    try:
        return config.replace(**{key: value for key, value in changes.items() if key not in typed})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def adopt(members: Sequence[Member], member: Member) -> None:
    """Give a run the preparation of the same column's other seeds, which is equal, as hard links."""
    if member.run.phases.exists():
        return
    other = next((m for m in members if m.column == member.column and m is not member and m.run.phases.exists()), None)
    if other is None:
        return
    for name in ("rows", "templates", "phases"):
        shutil.copytree(getattr(other.run, name), getattr(member.run, name), copy_function=_link)
    for path in other.run.root.glob("neighbours.*"):
        _link(path, member.run.root / path.name)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def complete(family: Family, prepare: Callable[[RunConfig], None], train: Callable[[RunConfig], None], evaluate: Callable[[Member], Any], tell: Callable[[str], None]) -> None:
    """All members in turn, first seed first, so that a family that is stopped has one seed of every column before two of any."""
    for i, member in enumerate(family.members, start=1):
        tell(f"{i} of {len(family.members)}: {member.column}, seed {member.seed}")
        adopt(family.members, member)
        prepare(member.config)
        if member.trained:
            train(member.config)
        evaluate(member)
