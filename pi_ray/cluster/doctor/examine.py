"""All looks in a row, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pi_ray.cluster import auth, requirements
from pi_ray.cluster.doctor import machine, remote
from pi_ray.cluster.doctor.finding import Finding, fail, note
from pi_ray.cluster.storage_sync import is_url
from pi_ray.config import INPUTS, RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from pi_ray.plan.estimate import ModelSize

STYLES = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}


def examine(config: RunConfig | None = None, address: str = "", folder: Path | None = None) -> Iterator[Finding]:
    """Look at this machine, or at the cluster at `address`, and at the run, where one is given. Each finding comes as soon as it is made.
    `folder` is the one with the run file, which a job takes along.

    Raises ConfigError for an address that is no URL of a Jobs API.
    """
    address = address and auth.address_of(address)
    yield from machine.check_versions()
    yield from remote.check_authentication(address)
    if any(requirements.packages_too_old()):
        return  # the rest would import them
    if address:
        yield from remote.check_cluster(address, config)
    else:
        yield from machine.check_scratch()
        yield from machine.check_shared_memory(config.train.workers if config else 1)
        yield from machine.check_ports(config)
    if config:
        yield from _run(config, address, _elsewhere(config, folder) if address else [])
    elif not address:
        yield from machine.check_storage(None)


def _elsewhere(config: RunConfig, folder: Path | None) -> list[str]:
    """Keys of what a job does not take along and this machine does not have: URLs, and paths that only the cluster's nodes may see."""
    from pi_ray.cluster.doctor.run import aids

    named = {"model.base": config.model.base, **aids(config), **{f"task.{key}": getattr(config.task, key) for key in INPUTS}}
    paths = {key: Path(value).expanduser() for key, value in named.items() if value and not (key.startswith("task.") and config.task.name == "opsql")}
    lacking = {key for key, path in paths.items() if path.is_absolute() and not path.exists() and not (folder and path.is_relative_to(folder.resolve()))}
    return [key for key in paths if key in lacking or is_url(named[key])]


def _run(config: RunConfig, address: str, elsewhere: list[str]) -> Iterator[Finding]:
    """The run itself. What lies on a cluster (`elsewhere`) is looked at by the job there."""
    from pi_ray.cluster.doctor import run

    if elsewhere:
        yield note("paths", f"not on this machine: {', '.join(elsewhere)}", "fine where every node of the cluster can read them under these names: the job looks for them there")
    size: ModelSize | None = None
    for found in run.check_model(config) if "model.base" not in elsewhere else ():
        if isinstance(found, Finding):
            yield found
        else:
            size = found
    yield from run.check_preparation(config, elsewhere)
    readable = True
    for found in run.check_data(config) if not any(key.startswith("task.") for key in elsewhere) else ():
        readable = readable and found.state != "fail"
        yield found
    for place in filter(is_url, (config.cluster.storage_path, config.store)):
        yield from machine.check_bucket(place)
    if address:
        if not is_url(config.cluster.storage_path):
            named = config.cluster.storage_path or "PI_RAY_STORAGE of the cluster's nodes, else ~/pi-ray there,"
            yield note("storage", f"{named} is not looked at from here", "every node must have that folder, shared, and may write there; with one node any disk will do")
        return
    yield from run.check_extras(config)
    yield from run.check_key(config)
    yield from machine.check_storage(config, run.disk_needed(config, size) if size else machine.ROOM)
    gpus = _gpus()
    yield from run.check_devices(config, gpus)
    if size and readable:
        yield from _memory(config, size, gpus)


def _memory(config: RunConfig, size: ModelSize, gpus: list[tuple[str, float]]) -> Iterator[Finding]:
    from pi_ray.cluster.doctor import run
    from pi_ray.errors import PiRayError
    from pi_ray.plan import estimate, plan

    try:
        made = plan.plan_run(config)
    except PiRayError as error:
        yield fail("plan", str(error), "mend that; 'pi-ray plan' then shows the run before it runs")
        return
    used = min(len(gpus), config.train.workers)
    yield from run.check_memory(config, made.memory, estimate.node_memory(size, config, used) if used else 0.0, gpus, machine.free_memory())


def _gpus() -> list[tuple[str, float]]:
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(p.name, float(p.total_memory)) for p in properties]


def print_findings(findings: Iterable[Finding], console: Console) -> int:
    """Print each as it comes. Returns how many fail."""
    from rich.text import Text

    failed = 0
    for found in findings:
        failed += found.state == "fail"
        word, style = STYLES[found.state]
        console.print(Text.assemble((word, style), f"  {found.what:14}{found.said}"))
        if found.cure:
            console.print(Text(f"      {'':14}-> {found.cure}", "dim" if found.state == "note" else ""))
    console.print(Text("nothing is in the way" if not failed else f"{failed} to mend", "bold"))
    return failed
