"""`pi-ray refresh`: the same run on the rows as they are now, from the adapter that is published. What a schedule runs (cluster/k8s/raycronjob.yaml)."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError, StorageError
from pi_ray.run.artifact import MANIFEST, staged, tell_of, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import prepare_fingerprint, train_fingerprint
from pi_ray.run.object_storage import Objects
from pi_ray.store.adapters import AdapterStore, UnknownAdapterError
from pi_ray.store.aliases import NEWEST

MARK = "refresh.json"  # in a refresh's directory: what it learns from, and whether it has been published


def config_of(config: RunConfig, now: datetime | None = None, there: Objects | None = None) -> RunConfig:
    """The run with a directory of its own, <run_dir>-<date>, that starts from the store's newest adapter of the run's name; `place` puts it there.

    A refresh that was cut short goes on, however long ago that was, while rows and settings are what they were: its directory and the adapter that it began
    with are kept. `there`: where directories beside the run's are kept when each node has only a copy. Raises AdapterError where nothing is published yet.
    """
    marks, of = _marks(config.root, there), _of(config)
    begun = [name for name, mark in marks.items() if mark.get("of") == of and not mark["published"]]
    if begun:
        name, version = max(begun), marks[max(begun)]["version"]
    else:
        day, version = f"{config.root.name}-{now or datetime.now(UTC):%Y-%m-%d}", _newest(config)
        name = next(name for name in (day if n == 1 else f"{day}-{n}" for n in count(1)) if name not in marks)
    root = config.root.parent / name
    return config.replace(run_dir=str(root), **{"train.init_adapter": str(root / "start" / version)})


def place(config: RunConfig) -> None:
    """Copy the adapter that the refresh starts from into its directory, where every worker finds it and no clearing of the store removes it. Raises AdapterError."""
    start = Path(config.train.init_adapter)
    if not (start / MANIFEST).is_file():
        found = AdapterStore(config.store, config.model).open(f"{config.name}@{start.name}").path
        with staged(start, source=f"{config.store}/{config.name}/{start.name}") as tmp:
            shutil.copytree(found, tmp, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    _write_mark(config, published=False)
    tell_of(RunDir(config.root).config)


def finish(config: RunConfig) -> None:
    """Its adapter is published: the next refresh is another one."""
    _write_mark(config, published=True)


def _write_mark(config: RunConfig, published: bool) -> None:
    write_atomic(config.root / MARK, json.dumps({"of": _of(config), "version": Path(config.train.init_adapter).name, "published": published}) + "\n")


def _of(config: RunConfig) -> str:
    """Fingerprint of what is learned, but for the adapter that it starts from."""
    from pi_ray.registry import tasks

    plain = config.replace(**{"train.init_adapter": ""})
    return train_fingerprint(plain, prepare_fingerprint(plain, tasks[config.task.name](config.task).fingerprint()))


def _marks(root: Path, there: Objects | None) -> dict[str, dict[str, Any]]:
    """The mark of each directory beside the run's that is named as a refresh is; an empty one where a directory has none. Raises StorageError."""
    pattern = f"{root.name}-????-??-??*"
    texts = {p.name: (p / MARK).read_bytes() if (p / MARK).is_file() else b"{}" for p in root.parent.glob(pattern)}
    if there:
        try:
            texts |= {name: there.read(f"{name}/{MARK}") or b"{}" for name in there.folders(pattern)}
        except OSError as error:
            raise StorageError(f"{there.url}: storage does not answer, or refuses ({error}); the same command goes on when it does") from error
    return {name: json.loads(text) for name, text in texts.items()}


def _newest(config: RunConfig) -> str:
    """The newest published version, such as v0002, which was verified."""
    try:
        return AdapterStore(config.store, config.model).open(f"{config.name}@{NEWEST}").path.name
    except UnknownAdapterError:
        raise AdapterError(f"{config.store}: no adapter '{config.name}' is published yet, so there is nothing to go on from; 'pi-ray run' makes and publishes the first") from None
