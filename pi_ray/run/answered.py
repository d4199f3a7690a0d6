"""Answered rows: what a teacher made of a run's queries before preparation, in place of rows that people labelled.

They lie in answered/ of the run directory, an artifact that answer/ writes. Every later step takes them as it takes a
user's labelled rows.
"""

from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig, TaskConfig
from pi_ray.errors import ConfigError, DataError
from pi_ray.protocols import SPLITS
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir


def answered_config(config: RunConfig) -> RunConfig:
    """The config with answered rows in place of the queries; the same config where no teacher answers first.

    Labelled dev and test files of the user's are kept. Labelled training rows stand among the answered ones.
    """
    if not config.answers_first:
        return config
    made = [split for split in SPLITS if split == "train" or not has_labelled(config, split)]
    files = {f"task.{split}": str(RunDir(config.root).answered / f"{split}.jsonl") for split in made}
    rows = {split: 0 for split in made}  # all: what the queries were limited to is answered
    asked = {"task.queries": "", "task.generate": False, "task.rows": {**config.task.rows.model_dump(), **rows}}
    return config.replace(ask={}, **files, **asked)


def require_queries(config: RunConfig) -> None:
    """Raises ConfigError for a teacher behind an endpoint that has nothing to answer, at the start of a run's steps.

    The answered config of such a run looks the same, and is right.
    """
    distills = config.train.objective != "sft" and config.train.distill.teacher == "endpoint"
    if distills and not config.answers_first:
        raise ConfigError("train.distill.teacher endpoint would have no effect: there are no queries for it to answer; "
            "name a file of them with task.queries, set task.queries generate, or take train.objective sft")


def has_labelled(config: RunConfig, split: str) -> bool:
    """Whether the user has a file with labelled rows of a split."""
    named = getattr(config.task, split)
    return bool(named) and Path(named).is_file()


def may_be_missing(path: Path, key: str) -> bool:
    """Whether a file has the default name of task.`key`, in a folder that is there: nobody need have named it."""
    return path.name == TaskConfig.model_fields[key].default and path.parent.is_dir()


def labelled_splits(config: RunConfig) -> list[str]:
    """The splits of which the user has labelled rows. Those under the default names may be missing, beside run.yaml.

    Raises DataError for a file that is named and not there: without its rows a teacher's answers would be measured.
    """
    for split in SPLITS:
        path = Path(getattr(config.task, split))
        if path.name and not may_be_missing(path, split) and not path.is_file():
            raise DataError(f"{path}: no such file; put the {split} rows there, name another file with task.{split}, "
                f"or set task.{split}='' where there are none")
    return [split for split in SPLITS if has_labelled(config, split)]


def answered_facts(config: RunConfig) -> dict[str, Any]:
    """How a teacher made the training rows, from the manifest of answered/; {} where people labelled them.

    "by": base or endpoint; "teacher": its name; "views"; numbers of "queries", "asked" and "kept" ones by split. A
    split that is not among the kept ones has people's answers.
    """
    folder, rows = RunDir(config.root).answered, answered_config(config).task.train
    return (read_manifest(folder) or {}).get("facts", {}) if rows and Path(rows).parent == folder else {}


def reference_teacher(summary: dict[str, Any]) -> dict[str, Any]:
    """How a teacher wrote the answers that all columns are compared with (`answered_facts`); {} where people did."""
    facts = summary.get("answered", {})
    return facts if summary.get("split") in facts.get("kept", ()) else {}
