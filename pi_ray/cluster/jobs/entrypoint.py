"""A step as a Ray job: what jobs/*.py and `pi-ray submit` run on the cluster.

A job's working directory is scratch, which goes with the cluster's session. So what came along is copied into the run directory on lasting
storage first, and the step runs from there: submitted again, on the same cluster or on its successor, it finds everything under the same paths.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pi_ray.cluster import requirements, storage_sync
from pi_ray.cluster.jobs import bundle
from pi_ray.config import INPUTS, RunConfig, dump, run_file
from pi_ray.errors import PiRayError, StorageError
from pi_ray.run.artifact import is_current, staged, write_atomic
from pi_ray.run.object_storage import Objects
from pi_ray.store import refresh


def run_job(command_line: Callable[[list[str]], int], verb: str, arguments: Sequence[str]) -> int:
    """`pi-ray VERB run.yaml [section.key=value ...]` on the cluster, where `command_line` is what the command `pi-ray` calls. Returns the exit code."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the job's log is for those who wait for the run
    try:
        requirements.check_requirements()
        again = verb == "refresh"
        config = settle(Path(arguments[0] if arguments else "run.yaml"), arguments[1:], again)
        command = ["run" if again else verb, str(config.root), *(["closed.confirmed=true"] if config.closed.confirmed else [])]
        sys.argv[1:] = command  # what the report names as its command
        with _mirrored(config):
            if not again:
                return command_line(command)
            refresh.place(config)
            code = command_line(command)
            if not code:
                refresh.finish(config)
            return code
    except PiRayError as error:
        print(f"pi-ray: {error}", file=sys.stderr)
        return error.exit_code


def settle(path: Path, overrides: Sequence[str], again: bool = False) -> RunConfig:
    """Give a run file its place on the cluster's storage, and write it there as resolved. Inputs that came along, or lie on object storage, are copied beside it.

    `again`: it is refreshed, in a directory of its own beside that.
    """
    path = path / "run.yaml" if path.is_dir() else path
    config = run_file.check(RunConfig, run_file.read(path), str(path), overrides)
    home, folder = storage_folder(config), path.resolve().parent
    root = home / Path(config.run_dir or f"runs/{config.name}").expanduser()
    config = config.replace(run_dir=str(root), store=_store(config, home))
    came_along = folder.is_relative_to(Path.cwd())
    found = bundle.bundled_files(config, folder) if came_along else {}
    config = _keep(run_file.absolute(bundle.bundled_config(config, folder), root) if came_along else run_file.absolute(config, folder), found)
    if again:
        there = _there(config)
        config = refresh.config_of(config, there=Objects(there.rpartition("/")[0]) if there else None)
    write_atomic(config.root / "run.yaml", dump(config.replace(**{"closed.confirmed": False})))  # a yes to spending is for one job
    return config


def storage_folder(config: RunConfig) -> Path:
    """Where relative run directories and stores lie on this cluster: cluster.storage_path, PI_RAY_STORAGE of its nodes, or ~/pi-ray.

    Every node must see the folder; the last one is for a cluster of one node. Where storage_path is a URL, each node has such a folder of its own.
    """
    place = "" if storage_sync.is_url(config.cluster.storage_path) else config.cluster.storage_path
    return Path(place or os.environ.get("PI_RAY_STORAGE") or "~/pi-ray").expanduser().absolute()


def _store(config: RunConfig, home: Path) -> str:
    store, place = config.store or "store", config.cluster.storage_path
    if storage_sync.is_url(store) or Path(store).expanduser().is_absolute():
        return store
    return f"{place.rstrip('/')}/{store}" if storage_sync.is_url(place) else str(home / store)


def _mirrored(config: RunConfig) -> AbstractContextManager[None]:
    """Where storage_path is a URL: the run directory is fetched from there first, and kept there from then on."""
    there = _there(config)
    return storage_sync.Mirror(config.root, Objects(there)).attached() if there else nullcontext()


def _there(config: RunConfig) -> str:
    """The run directory's URL; "" where storage_path is a folder."""
    place, home = config.cluster.storage_path, storage_folder(config)
    if not storage_sync.is_url(place):
        return ""
    inside = config.root.relative_to(home) if config.root.is_relative_to(home) else Path("runs") / config.root.name
    return f"{place.rstrip('/')}/{inside.as_posix()}"


def _keep(config: RunConfig, found: dict[str, Path]) -> RunConfig:
    """Copy the inputs that were `found`, and those that `task` names by URL, into the run directory, and name the latter there.

    What is not there is missing here too. Raises StorageError.
    """
    urls = {key: getattr(config.task, key).rstrip("/") for key in INPUTS if storage_sync.is_url(getattr(config.task, key))}
    with tempfile.TemporaryDirectory() as scratch:
        for key, url in urls.items():
            above, _, name = url.rpartition("/")
            try:
                there = Objects(above)
                for path in (path for path in there.list() if path == name or path.startswith(f"{name}/")):
                    found[f"{key}{Path(name).suffix}{path.removeprefix(name)}"] = to = Path(scratch) / key / path
                    to.parent.mkdir(parents=True, exist_ok=True)
                    there.fetch(path, to)
            except OSError as error:
                raise StorageError(f"task.{key}: {url} cannot be read ({error}); may this node read it?") from error
        _place(found, config.root)
    return config.replace(**{f"task.{key}": str(config.root / bundle.FOLDER / f"{key}{Path(url).suffix}") for key, url in urls.items()})


def _place(found: dict[str, Path], root: Path) -> None:
    """Copy inputs into the run directory, unless these very ones are there."""
    final, fingerprint = root / bundle.FOLDER, bundle.bundle_fingerprint(found)
    if found and not is_current(final, fingerprint):
        with staged(final, fingerprint=fingerprint) as tmp:
            bundle.copy_files(found, tmp)

