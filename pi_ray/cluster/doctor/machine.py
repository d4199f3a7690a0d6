"""Looks at this machine: versions, disk, shared memory, ports, memory. Each yields what it found; none changes anything that lasts."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from pi_ray.cluster import requirements
from pi_ray.cluster.doctor.finding import Finding, fail, note, ok
from pi_ray.cluster.storage_sync import is_url
from pi_ray.config import RunConfig
from pi_ray.run.artifact import CURES

GIB = 2**30
ROOM = 2 * GIB  # for rows, templates, evaluation and the report
RAY_PORTS = {6379: "ray start --head", 8265: "its dashboard"}
SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_versions() -> Iterator[Finding]:
    """pi-ray's floors."""
    lacking = dict(requirements.packages_too_old())
    for name, found in lacking.items():
        yield fail("versions", f"{name} {found or 'is missing'}, and pi-ray needs {requirements.FLOORS[name]} or newer", requirements.cure(name))
    if not lacking:
        yield ok("versions", ", ".join(f"{name} {requirements.installed(name)}" for name in requirements.FLOORS))


def check_storage(config: RunConfig | None, needed: float = ROOM) -> Iterator[Finding]:
    """Run directory and store can be written, which is tried, and there is room. `needed` in bytes. A store behind a URL is for `bucket`."""
    places = {"run directory": config.run_dir, "adapter store": config.store} if config else {"run directory": str(Path.cwd() / "runs")}
    seen: set[Path] = set()
    for name, folder in ((name, Path(place)) for name, place in places.items() if not is_url(place)):
        there = next(p for p in (folder, *folder.parents) if p.is_dir())
        if there in seen:
            continue
        seen.add(there)
        error = _written(there)
        free = shutil.disk_usage(there).free
        if error:
            key = "run_dir" if name == "run directory" else "store"
            yield fail("storage", f"{folder} ({name}) cannot be written: {os.strerror(error)}", CURES.get(error, f"set {key} to a folder on a disk that works"))
        elif free < needed:
            yield fail("storage", f"{there} has {free / GIB:.1f} GiB free, and the run takes about {needed / GIB:.1f} GiB", "free some space, or set run_dir (or cluster.storage_path) to a larger disk")
        else:
            yield ok("storage", f"{there} can be written, {free / GIB:.0f} GiB free")


def _written(folder: Path) -> int:
    """0, or the errno of writing, syncing and renaming a small file as every artefact is written."""
    path = folder / f".pi-ray-doctor.{uuid.uuid4().hex}"
    try:
        with open(path, "wb") as f:
            f.write(b"pi-ray" * 1000)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path, path.with_suffix(".renamed"))
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        path.unlink(missing_ok=True)
        path.with_suffix(".renamed").unlink(missing_ok=True)
    return 0


def check_bucket(location: str) -> Iterator[Finding]:
    """Storage behind a URL (cluster.storage_path, store) can be written, moved in and deleted from, with the credentials of this machine."""
    from pyarrow import fs

    if location.startswith("hf://"):
        yield note("storage", f"{location} is not tried, since each file would be a commit there", "HF_TOKEN must be allowed to write there")
        return
    try:
        place, path = fs.FileSystem.from_uri(location)
        name = f"{path}/.pi-ray-doctor.{uuid.uuid4().hex}"
        place.create_dir(path)
        with place.open_output_stream(name) as stream:
            stream.write(b"pi-ray")
        place.move(name, f"{name}.moved")
        place.delete_file(f"{name}.moved")
    except (OSError, ValueError, NotImplementedError) as error:
        cure = "check its name and region, and this machine's credentials (an AWS profile or role, gcloud auth application-default login); the cluster's nodes need them too"
        yield fail("storage", f"{location} cannot be written: {str(error).splitlines()[0][:200]}", cure)
        return
    yield ok("storage", f"{location} can be written")


def check_scratch() -> Iterator[Finding]:
    """Ray's session folder: Ray stops making objects when its disk is 95% full."""
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    usage = shutil.disk_usage(folder)
    used = 1 - usage.free / usage.total
    cure = "free some space, or set RAY_TMPDIR to a folder on another disk"
    yield fail("scratch", f"the disk of {folder} is {used:.0%} full, and Ray stops at 95%", cure) if used > 0.95 else ok("scratch", f"{folder} has {usage.free / GIB:.0f} GiB free")


def check_shared_memory(workers: int, folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Ray's object store and NCCL live in it; containers often have 64 MiB."""
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total
    cure = "give the container more: docker run --shm-size=8g, or on Kubernetes an emptyDir with medium: Memory at /dev/shm"
    said = f"{folder} holds {size / GIB:.1f} GiB"
    if size >= GIB:
        yield ok("shared memory", said)
    else:
        yield (fail if workers > 1 else note)("shared memory", f"{said}, so that Ray keeps its objects on disk" + (" and GPU workers may not reach each other" if workers > 1 else ""), cure)


def check_ports(config: RunConfig | None) -> Iterator[Finding]:
    """The port that `pi-ray serve` would take, and those of `ray start --head`."""
    if config:
        host, port = config.serve.host, config.serve.port
        error = _bound(host, port)
        yield fail("ports", f"serving: {host}:{port}: {error}", "set serve.port to a free port, or end what listens there") if error else ok("ports", f"serving: {host}:{port} is free")
    for port, whose in RAY_PORTS.items():
        if _bound("127.0.0.1", port):
            yield note("ports", f"127.0.0.1:{port}, that of {whose}, is taken", "is it your cluster? Then 'pi-ray doctor --address http://127.0.0.1:8265' looks at it; else give ray start --port and --dashboard-port")


def _bound(host: str, port: int) -> str:
    """What keeps a server from listening there, or ""."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return os.strerror(error.errno) if error.errno else str(error)
    return ""


def free_memory() -> float:
    """Bytes of memory that this process may still take: what is available, or the container's limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines()) if Path("/proc/meminfo").exists() else {}
    free = float(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else float("inf")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(free, float(limit)) if limit.isdigit() else free
