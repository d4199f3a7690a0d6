"""`pi-ray refresh`: the same run on the rows as they are now, from the adapter that is published. What a schedule runs (cluster/k8s/raycronjob.yaml)."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from pi_ray import runfile
from pi_ray.artifact import MANIFEST, staged, tell_of
from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError
from pi_ray.objects import Objects
from pi_ray.rundir import RunDir
from pi_ray.serving.adapters import AdapterStore, UnknownAdapterError
from pi_ray.serving.aliases import NEWEST

DAY = "????-??-??"


def config_of(config: RunConfig, now: datetime | None = None, there: Objects | None = None) -> RunConfig:
    """The run with a directory of its own, <run_dir>-<date>, that starts from the store's newest adapter of the run's name; `place` puts it there.

    A refresh that was cut short goes on, however long ago that was: its directory and the adapter that it began with are kept. `there`: where directories
    beside the run's are kept when each node has only a copy. Raises AdapterError where nothing is published yet.
    """
    name, version = _begun(config.root, there) or (f"{config.root.name}-{now or datetime.now(UTC):%Y-%m-%d}", _newest(config))
    root = config.root.parent / name
    return config.replace(run_dir=str(root), **{"train.start": str(root / "start" / version)})


def place(config: RunConfig) -> None:
    """Copy the adapter that the refresh starts from into its directory, where every worker finds it and no clearing of the store removes it. Raises AdapterError."""
    start = Path(config.train.start)
    if not (start / MANIFEST).is_file():
        found = AdapterStore(config.store, config.model).open(f"{config.name}@{start.name}").path
        with staged(start, source=f"{config.store}/{config.name}/{start.name}") as tmp:
            shutil.copytree(found, tmp, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    tell_of(RunDir(config.root).config)


def _begun(root: Path, there: Objects | None) -> tuple[str, str] | None:
    """Directory and first adapter's version of the newest refresh that has a run file and no report."""
    if there:
        keys = {key for folder in there.folders(f"{root.name}-{DAY}") for key in there.list(folder, deep=False)}
        texts = {key.split("/")[0]: there.read(key) or b"" for key in keys if key.endswith("/run.yaml") and key.replace("run.yaml", "report.html") not in keys}
    else:
        texts = {p.name: (p / "run.yaml").read_bytes() for p in root.parent.glob(f"{root.name}-{DAY}") if (p / "run.yaml").is_file() and not RunDir(p).report.exists()}
    if not texts:
        return None
    name = max(texts)
    return name, Path(runfile.parse(texts[name].decode(), f"{name}/run.yaml").train.start).name


def _newest(config: RunConfig) -> str:
    """The newest published version, such as v0002, which was verified."""
    try:
        return AdapterStore(config.store, config.model).open(f"{config.name}@{NEWEST}").path.name
    except UnknownAdapterError:
        raise AdapterError(f"{config.store}: no adapter '{config.name}' is published yet, so there is nothing to go on from; 'pi-ray run' makes and publishes the first") from None
