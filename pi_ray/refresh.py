"""`pi-ray refresh`: the same run on the rows as they are now, from the adapter that is published. What a schedule runs (cluster/k8s/raycronjob.yaml)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError
from pi_ray.rundir import RunDir
from pi_ray.serving.adapters import AdapterStore, UnknownAdapterError
from pi_ray.serving.aliases import NEWEST


def config_of(config: RunConfig, now: datetime | None = None) -> RunConfig:
    """The run with a directory of its own, <run_dir>-<date>, that starts from the store's newest adapter of the run's name.

    A refresh that was cut short goes on, however long ago that was: its directory and the adapter that it began with are kept. Raises AdapterError where nothing is published yet.
    """
    root = config.root
    begun = sorted(p for p in root.parent.glob(f"{root.name}-????-??-??") if (p / "run.yaml").is_file() and not RunDir(p).report.exists())
    if begun:
        from pi_ray.runfile import load

        return config.replace(run_dir=str(begun[-1]), **{"train.start": load(begun[-1] / "run.yaml").train.start})
    return config.replace(run_dir=f"{root}-{now or datetime.now(UTC):%Y-%m-%d}", **{"train.start": str(_newest(config))})


def _newest(config: RunConfig) -> Path:
    """The folder of the newest published version, verified; of a store behind a URL, its copy here."""
    try:
        return AdapterStore(config.store, config.model).open(f"{config.name}@{NEWEST}").path
    except UnknownAdapterError:
        raise AdapterError(f"{config.store}: no adapter '{config.name}' is published yet, so there is nothing to go on from; 'pi-ray run' makes and publishes the first") from None
