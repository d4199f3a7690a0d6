"""`pi-ray doctor`: whether a run can work here, or on a cluster, and how to mend what is in its way."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pi_ray.cluster import auth, requirements
from pi_ray.cluster.doctor import machine, remote
from pi_ray.cluster.doctor.finding import Finding, note
from pi_ray.config import RunConfig
from pi_ray.run.object_storage import is_url

STYLES = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}


def examine(config: RunConfig | None = None, address: str = "", folder: Path | None = None) -> Iterator[Finding]:
    """Check this machine, or the cluster at `address`, and the run, where one is given.

    A job takes along what lies in the run file's `folder`. Raises ConfigError for an address that is no Jobs API's URL.
    """
    address = address and auth.address_of(address)
    yield from machine.check_versions()
    yield from remote.check_authentication(address)
    if any(requirements.packages_too_old()):
        return  # the other checks would import them
    if address:
        yield from remote.check_cluster(address, config)
    else:
        yield machine.check_scratch()
        yield from machine.check_shared_memory(config.train.workers if config else 1)
        yield from machine.check_ports(config)
    if config:
        yield from _check_run(config, address, [*_elsewhere(config, folder)] if address else [])
    elif not address:
        yield from machine.check_storage(None)


def _elsewhere(config: RunConfig, folder: Path | None) -> Iterator[str]:
    """Keys of inputs that neither travel with a job nor lie here: URLs, and paths that the cluster's nodes may see."""
    from pi_ray.cluster.doctor.run import other_models

    inputs = {f"task.{key}": value for key, value in config.task.inputs.items()}
    for key, value in {"model.base": config.model.base, **other_models(config), **inputs}.items():
        path = Path(value).expanduser()
        travels = folder and path.is_relative_to(folder.resolve())
        if is_url(value) or (path.is_absolute() and not path.exists() and not travels):
            yield key


def _check_run(config: RunConfig, address: str, elsewhere: list[str]) -> Iterator[Finding]:
    """Check the run itself. The job on the cluster checks the inputs that lie `elsewhere`."""
    from pi_ray.cluster.doctor import run

    if elsewhere:
        cure = "fine where every node of the cluster can read them under these names: the job looks for them there"
        yield note("paths", f"not on this machine: {', '.join(elsewhere)}", cure)
    size, readable = None, True
    if "model.base" not in elsewhere:
        found, size = run.check_model(config)
        yield found
    yield from run.check_preparation(config, elsewhere)
    if not any(key.startswith("task.") for key in elsewhere):
        yield (found := run.check_data(config))
        readable = found.state != "fail"
    for place in filter(is_url, (config.cluster.storage_path, config.store)):
        yield machine.check_bucket(place)
    if address:
        if not is_url(config.cluster.storage_path):
            named = config.cluster.storage_path or "PI_RAY_STORAGE of the cluster's nodes, else ~/pi-ray there,"
            cure = "every node must have that folder, shared, and may write there; with one node any disk will do"
            yield note("storage", f"{named} is not looked at from here", cure)
        return
    yield from run.check_extras(config)
    yield run.check_key(config)
    yield from machine.check_storage(config, run.disk_needed(config, size) if size else machine.ROOM)
    gpus = machine.gpus_here()
    yield run.check_devices(config, gpus)
    if size and readable:
        yield from run.check_plan(config, gpus)


def print_findings(findings: Iterable[Finding], console: Console) -> int:
    """Print each finding as it comes. Returns how many fail."""
    failed = 0
    for found in findings:
        failed += found.state == "fail"
        word, style = STYLES[found.state]
        console.print(Text.assemble((word, style), f"  {found.what:14}{found.message}"))
        if found.cure:
            console.print(Text(f"      {'':14}-> {found.cure}", "dim" if found.state == "note" else ""))
    console.print(Text("nothing is in the way" if not failed else f"{failed} to mend", "bold"))
    return failed
