"""Runs a step as a Ray job: gives the run a place on the cluster's storage, and calls the command line there.

A job's working directory goes with the cluster's session. So its inputs are first copied into the run directory on
lasting storage, where the run, submitted again to this cluster or its successor, finds everything under the same paths.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from pi_ray.cluster import requirements
from pi_ray.cluster.jobs import bundle
from pi_ray.cluster.storage_sync import StorageSync
from pi_ray.config import RunConfig, dump_config, run_file
from pi_ray.errors import PiRayError, StorageError
from pi_ray.run.artifact import is_current, staged, write_atomic
from pi_ray.run.object_storage import ObjectStorage, is_url
from pi_ray.store import refresh
from pi_ray.store.follow_prompt import tell_stale_labels


def run_job(command_line: Callable[[list[str]], int], verb: str, arguments: Sequence[str]) -> int:
    """Run `pi-ray VERB run.yaml [section.key=value ...]` on the cluster through `command_line`; its exit code."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # people who wait for the run read the job's log
    try:
        requirements.check_requirements()
        refreshes = verb == "refresh"
        config = settle(Path(arguments[0] if arguments else "run.yaml"), arguments[1:], refreshes)
        confirmed = ["closed.confirmed=true"] if config.closed.confirmed else []
        command = ["run" if refreshes else verb, str(config.root), *confirmed]
        sys.argv[1:] = command  # the report names it
        there = _url_of(config)
        with StorageSync(config.root, ObjectStorage(there)).attach_driver() if there else nullcontext():
            if refreshes:
                refresh.copy_start_adapter(config)
                tell_stale_labels(config, print)
            code = command_line(command)
            if refreshes and not code:
                refresh.write_mark(config, published=True)
            return code
    except PiRayError as error:
        print(f"pi-ray: {error}", file=sys.stderr)
        return error.exit_code


def settle(path: Path, overrides: Sequence[str], refreshes: bool = False) -> RunConfig:
    """Write the resolved run file, and copy its inputs, into a directory on the cluster's storage (a refresh's own)."""
    path = path / "run.yaml" if path.is_dir() else path
    config = run_file.validate_yaml(RunConfig, run_file.read_run_file(path), str(path), overrides)
    home, folder = storage_folder(config), path.resolve().parent
    root = home / run_file.expand_home(config.run_dir or f"runs/{config.name}")
    store, place = config.store or "store", config.cluster.storage_path
    if not is_url(store) and not run_file.expand_home(store).is_absolute():
        store = f"{place.rstrip('/')}/{store}" if is_url(place) else str(home / store)
    # As the store: the job's working directory goes away, and a keys file does not travel with it.
    serving = {"keys_file": config.serve.keys_file, "usage_dir": config.serve.usage_dir}
    places = {f"serve.{key}": str(home / run_file.expand_home(value)) for key, value in serving.items() if value}
    # A score file is its submitter's program on a machine that others use.
    walled = {f"task.metric.{i}.sandbox": True for i, m in enumerate(config.task.metric) if m.name == "python"}
    config = config.replace(run_dir=str(root), store=store, **walled, **places)
    found: dict[str, Path] = {}
    came = folder.is_relative_to(Path.cwd())  # with the job
    if came:
        config, found = bundle.gather_inputs(config, folder)
    if refreshes:
        config = _as_refresh(config, None if came else folder, found)
    config = _copy_inputs(run_file.make_paths_absolute(config, config.root if came else folder), found)
    once = config.replace(**{"closed.confirmed": False})  # a confirmed cost holds for one job
    write_atomic(config.root / "run.yaml", dump_config(once))
    return config


def _as_refresh(config: RunConfig, folder: Path | None, found: dict[str, Path]) -> RunConfig:
    """The refresh of a run, whose inputs lie in `folder`, or in the job. Its directory's name hangs on what they hold.

    So they are first read in a folder that goes away: the first run's own stay as they are.
    """
    there = _url_of(config)
    storage = ObjectStorage(there.rpartition("/")[0]) if there else None
    with tempfile.TemporaryDirectory() as scratch:
        read = config.replace(run_dir=scratch)
        read = _copy_inputs(run_file.make_paths_absolute(read, folder or Path(scratch)), dict(found))
        made = refresh.refresh_config(read.replace(run_dir=config.run_dir), storage=storage)
    return config.replace(run_dir=made.run_dir, **{"train.init_adapter": made.train.init_adapter})


def storage_folder(config: RunConfig) -> Path:
    """The folder of relative paths, which all nodes see (~/pi-ray: the only one); each node's own beside a bucket."""
    place = "" if is_url(config.cluster.storage_path) else config.cluster.storage_path
    return Path(place or os.environ.get("PI_RAY_STORAGE") or "~/pi-ray").expanduser().absolute()


def _url_of(config: RunConfig) -> str:
    """The run directory's URL, with which it is kept in step; "" where storage_path is a folder."""
    place, home = config.cluster.storage_path, storage_folder(config)
    if not is_url(place):
        return ""
    inside = config.root.relative_to(home) if config.root.is_relative_to(home) else Path("runs") / config.root.name
    return f"{place.rstrip('/')}/{inside.as_posix()}"


def _copy_inputs(config: RunConfig, found: dict[str, Path]) -> RunConfig:
    """Copy `found` inputs and those named by URL into the run directory, where the config then names them all."""
    urls = {key: url.rstrip("/") for key, url in config.task.inputs.items() if is_url(url)}
    names = {key: f"{key}{Path(url).suffix}" for key, url in urls.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for key, url in urls.items():
            source = Path(scratch) / names[key]
            try:
                ObjectStorage(url).fetch_all(source)
            except OSError as error:
                raise StorageError(f"task.{key}: {url} cannot be read ({error}); may this node read it?") from error
            found |= bundle.files_of(names[key], source)
        final, fingerprint = config.root / bundle.FOLDER, bundle.bundle_fingerprint(found)
        if found and not is_current(final, fingerprint):
            with staged(final, fingerprint=fingerprint) as tmp:
                bundle.copy_files(found, tmp)
    return config.replace(**{f"task.{key}": str(final / name) for key, name in names.items()})
