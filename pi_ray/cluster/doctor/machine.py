"""Checks of this machine: versions, disk, shared memory, ports, memory. None changes anything that lasts."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from pi_ray.cluster import requirements
from pi_ray.cluster.doctor.finding import Finding, fail, note, ok
from pi_ray.config import RunConfig
from pi_ray.errors import StorageError
from pi_ray.run.artifact import DISK_CURES, temporary_path, write_atomic
from pi_ray.run.object_storage import ObjectStorage, is_url

GIB = 2**30
ROOM = 2 * GIB  # for rows, templates, evaluation and the report
PROBE = Path("pi-ray-doctor")  # a file that is written to see whether that works
RAY_PORTS = {6379: "ray start --head", 8265: "its dashboard"}


def check_versions() -> Iterator[Finding]:
    lacking = list(requirements.packages_too_old())
    yield from (fail("versions", problem, cure) for problem, cure in lacking)
    if not lacking:
        installed = (f"{name} {requirements.installed_version(name)}" for name in requirements.FLOORS)
        yield ok("versions", ", ".join(installed))


def check_storage(config: RunConfig | None, needed: float = ROOM) -> Iterator[Finding]:
    """Check by writing that the folders of run and store can be written, and that `needed` bytes are free."""
    places = {"run_dir": config.run_dir, "store": config.store} if config else {"run_dir": str(Path("runs").absolute())}
    seen: set[Path] = set()
    for key, folder in ((key, Path(place)) for key, place in places.items() if not is_url(place)):
        parent = next(p for p in (folder, *folder.parents) if p.is_dir())
        if parent in seen:
            continue
        seen.add(parent)
        error, free = _write_error(parent), shutil.disk_usage(parent).free
        if error:
            cure = DISK_CURES.get(error, f"set {key} to a folder on a disk that works")
            yield fail("storage", f"{folder} ({key}) cannot be written: {os.strerror(error)}", cure)
        elif free < needed:
            message = f"{parent} has {free / GIB:.1f} GiB free, and the run takes about {needed / GIB:.1f} GiB"
            yield fail("storage", message, "free some space, or set run_dir (or cluster.storage_path) to a larger disk")
        else:
            yield ok("storage", f"{parent} can be written, {free / GIB:.0f} GiB free")


def _write_error(folder: Path) -> int:
    """Write a small file as every artifact is written. Returns 0, or the errno."""
    probe = temporary_path(folder / PROBE)
    try:
        write_atomic(probe, b"pi-ray" * 1000)
    except (OSError, StorageError) as error:
        return getattr(error.__cause__ or error, "errno", None) or errno.EIO
    finally:
        probe.unlink(missing_ok=True)
    return 0


def check_bucket(location: str) -> Finding:
    """Check by trying that this machine may write, move and delete under a URL (cluster.storage_path, store)."""
    if location.startswith("hf://"):
        message = f"{location} is not tried, since each file would be a commit there"
        return note("storage", message, "HF_TOKEN must be allowed to write there")
    try:
        storage, key = ObjectStorage(location), temporary_path(PROBE).name
        storage.upload(b"pi-ray", key)  # under another name, then moved
        storage.delete(key)
    except (OSError, StorageError, NotImplementedError) as error:
        logins = "an AWS profile or role, gcloud auth application-default login"
        cure = f"check its name and region, and the credentials here ({logins}); the cluster's nodes need them too"
        return fail("storage", f"{location} cannot be written: {str(error).splitlines()[0][:200]}", cure)
    return ok("storage", f"{location} can be written")


def check_scratch() -> Finding:
    """Check the disk of Ray's session folder: Ray stops making objects when it is 95% full."""
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    usage = shutil.disk_usage(folder)
    used = 1 - usage.free / usage.total
    if used > 0.95:
        cure = "free some space, or set RAY_TMPDIR to a folder on another disk"
        return fail("scratch", f"the disk of {folder} is {used:.0%} full, and Ray stops at 95%", cure)
    return ok("scratch", f"{folder} has {usage.free / GIB:.0f} GiB free")


def check_shared_memory(workers: int, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check shared memory, which Ray's object store and NCCL use; containers often have 64 MiB."""
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total
    message = f"{folder} holds {size / GIB:.1f} GiB"
    cure = "give the container more: docker run --shm-size=8g; Kubernetes: an emptyDir with medium: Memory at /dev/shm"
    if size >= GIB:
        yield ok("shared memory", message)
    elif workers > 1:
        message += ", so that Ray keeps its objects on disk and GPU workers may not reach each other"
        yield fail("shared memory", message, cure)
    else:
        yield note("shared memory", f"{message}, so that Ray keeps its objects on disk", cure)


def check_ports(config: RunConfig | None) -> Iterator[Finding]:
    """Check the port that `pi-ray serve` would take, and the ports of `ray start --head`."""
    if config:
        host, port = config.serve.host, config.serve.port
        if error := _bind_error(host, port):
            cure = "set serve.port to a free port, or end the program that listens there"
            yield fail("ports", f"serving: {host}:{port}: {error}", cure)
        else:
            yield ok("ports", f"serving: {host}:{port} is free")
    for port, whose in RAY_PORTS.items():
        if _bind_error("127.0.0.1", port):
            look = "is it your cluster? Then 'pi-ray doctor --address http://127.0.0.1:8265' looks at it"
            cure = f"{look}; else give ray start --port and --dashboard-port"
            yield note("ports", f"127.0.0.1:{port}, that of {whose}, is taken", cure)


def _bind_error(host: str, port: int) -> str:
    """The error of a server that would listen there, or ""."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return ""


def gpus_here() -> list[tuple[str, float]]:
    """(name, bytes of memory) of each GPU."""
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(p.name, float(p.total_memory)) for p in properties]
