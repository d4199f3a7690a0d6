"""`pi-ray refresh`: the same run on the rows as they are now, from the published adapter. A schedule may start it.

Each refresh has a run directory of its own, with a mark in it: what it learns from, and whether it is published.
"""

import json
import shutil
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError
from pi_ray.models import base_digest, preparation_digest
from pi_ray.run.artifact import MANIFEST, notify_written, staged, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import prepare_fingerprint, train_fingerprint
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.store.adapters import LATEST, AdapterStore, UnknownAdapterError

MARK_FILE = "refresh.json"


def refresh_config(config: RunConfig, now: datetime | None = None, storage: ObjectStorage | None = None) -> RunConfig:
    """The run in a directory of its own, <run_dir>-<date>, that starts from the newest adapter of the run's name.

    A refresh that was cut short goes on, however long ago that was, while rows and settings are the same: its directory
    and its start adapter are kept. `storage` holds the directories beside the run's where each node has only a copy.
    Raises AdapterError where nothing is published yet, StorageError where `storage` does not answer.
    """
    marks, fingerprint = _read_marks(config.root, storage), _fingerprint(config)
    unfinished = [name for name, mark in marks.items() if mark.get("of") == fingerprint and not mark["published"]]
    if unfinished:
        name = max(unfinished)
        version = marks[name]["version"]
    else:
        try:
            version = AdapterStore(config.store, config.model).open(f"{config.name}@{LATEST}").version
        except UnknownAdapterError:
            cure = "so there is nothing to go on from; 'pi-ray run' makes and publishes the first"
            raise AdapterError(f"{config.store}: no adapter '{config.name}' is published yet, {cure}") from None
        today = f"{config.root.name}-{now or datetime.now(UTC):%Y-%m-%d}"
        name = next(name for n in count(1) if (name := today if n == 1 else f"{today}-{n}") not in marks)
    root = config.root.parent / name
    return config.replace(run_dir=str(root), **{"train.init_adapter": str(root / "start" / version)})


def copy_start_adapter(config: RunConfig) -> None:
    """Copy the start adapter into the refresh's run directory, for all workers and for good. Raises AdapterError."""
    start = Path(config.train.init_adapter)
    if not (start / MANIFEST).is_file():
        found = AdapterStore(config.store, config.model).open(f"{config.name}@{start.name}").path
        with staged(start, source=f"{config.store}/{config.name}/{start.name}") as tmp:
            shutil.copytree(found, tmp, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    write_mark(config, published=False)
    notify_written(RunDir(config.root).config)


def write_mark(config: RunConfig, published: bool) -> None:
    """Note whether the refresh's adapter is published: if so, the next refresh is another one."""
    mark = {"of": _fingerprint(config), "version": Path(config.train.init_adapter).name, "published": published}
    write_atomic(config.root / MARK_FILE, json.dumps(mark) + "\n")


def _fingerprint(config: RunConfig) -> str:
    """Fingerprint of the training, but for the adapter from which it starts."""
    from pi_ray.registry import tasks

    bare = config.replace(**{"train.init_adapter": ""})
    task, base = tasks[config.task.name](config.task), base_digest(config.model)
    return train_fingerprint(bare, prepare_fingerprint(bare, task.fingerprint(), base=preparation_digest(bare)), base)


def _read_marks(root: Path, storage: ObjectStorage | None) -> dict[str, dict[str, Any]]:
    """The mark of each directory beside the run's that is named like a refresh's; {} for one without a mark."""
    pattern = f"{root.name}-????-??-??*"
    files = {folder.name: folder / MARK_FILE for folder in root.parent.glob(pattern)}
    texts = {name: file.read_bytes() if file.is_file() else b"{}" for name, file in files.items()}
    if storage:
        with storage.explain_errors("the same command goes on when it does"):
            names = storage.list_folders(pattern=pattern)
            texts |= {name: storage.read(f"{name}/{MARK_FILE}") or b"{}" for name in names}
    return {name: json.loads(text) for name, text in texts.items()}
