"""Steps that die at the n-th change of the disk below a root: a file that is opened for writing, renamed, synced or
removed, a folder that is made or removed.

Python's audit events tell of every such call, also inside libraries; `os.fsync`, which has none, is wrapped. With
`torn`, a file that was to be synced is cut in half first, as a power cut may leave it. A step runs in a process that is
forked from a clean one with the libraries loaded, so that hundreds of deaths take minutes. A worker of a Ray cluster
dies in the same way while its driver lives, where the cluster was started with the PYTHONPATH that `obey` returns.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

KILLED = 137
RECORD = 256  # bytes of a change in the log that workers share
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate"}
PRELOADED = ["pi_ray.train.trainer", "pi_ray.store.publish", "pi_ray.store.release", "peft", "tests.crashing"]


class Injector:
    """Counts changes below `root` and ends the process in place of number `at`, counted from 1."""

    def __init__(self, root: Path, at: int, torn: bool):
        self.root, self.at, self.torn, self.seen = os.path.realpath(root), at, torn, list[str]()

    def install(self) -> None:
        sync = os.fsync

        def fsync(fd: Any) -> None:
            number = fd if isinstance(fd, int) else fd.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            self.note("fsync", path)
            sync(fd)

        os.fsync = fsync  # type: ignore[assignment]
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        for path in arguments[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                self.note(event.removeprefix("os."), os.fsdecode(path))
                return

    def note(self, change: str, path: str) -> None:
        if not os.path.abspath(path).startswith(self.root):
            return
        if self.count(f"{change} {os.path.relpath(path, self.root)}") == self.at:
            if self.torn and change == "fsync" and stat.S_ISREG(os.stat(path).st_mode):
                os.truncate(path, os.path.getsize(path) // 2)
            os._exit(KILLED)

    def count(self, change: str) -> int:
        """Keep the change. Returns its number."""
        self.seen.append(change)
        return len(self.seen)


class WorkerInjector(Injector):
    """Counts the changes that all processes of a Ray cluster make together, by `orders`, which a driver gives anew for
    each try: one process dies, at change `at`, and the cluster goes on.
    """

    def __init__(self, orders: Path):
        super().__init__(orders.parent, 0, False)
        self.orders = orders

    def note(self, change: str, path: str) -> None:
        if not os.path.abspath(path).startswith(self.root) or not self.orders.exists():
            return
        order = json.loads(self.orders.read_text())
        self.at, self.torn = order["at"], order["torn"]
        if os.path.abspath(path).startswith(order["root"]):
            super().note(change, path)

    def count(self, change: str) -> int:
        log = os.open(seen_by_workers(self.orders), os.O_RDWR | os.O_APPEND)
        try:
            os.write(log, change.encode()[-RECORD + 1 :].ljust(RECORD - 1) + b"\n")
            return os.lseek(log, 0, os.SEEK_CUR) // RECORD  # appending moves to where this record ends
        finally:
            os.close(log)


def seen_by_workers(orders: Path) -> Path:
    return orders.with_suffix(".seen")


def give_orders(orders: Path, root: Path, at: int = 0, torn: bool = False) -> None:
    """Have the process of the cluster that makes change `at` below `root` die there; 0 only counts."""
    seen_by_workers(orders).write_bytes(b"")
    orders.write_text(json.dumps({"root": os.path.realpath(root), "at": at, "torn": torn}))


def changes_of_workers(orders: Path) -> list[str]:
    """The changes since orders were given."""
    return [line.strip() for line in seen_by_workers(orders).read_text().splitlines()]


def obey(orders: Path, packages: Path) -> str:
    """Write into `packages` a module that Python imports at its start; the PYTHONPATH of processes that obey."""
    packages.mkdir(parents=True)
    (packages / "sitecustomize.py").write_text(
        f"from pathlib import Path\nfrom tests.crashing import WorkerInjector\n\n"
        f"WorkerInjector(Path({str(orders)!r})).install()\n"
    )
    return f"{packages}{os.pathsep}{Path(__file__).parents[1]}"


def _child(
    step: Callable[[Path], None], root: Path, at: int, torn: bool, seen: Path, environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # in place of the server's, which may have started long ago
    injector = Injector(root, at, torn)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    injector.install()
    step(root)
    seen.write_text(json.dumps(injector.seen))


def run_step(step: Callable[[Path], None], root: Path, at: int = 0, torn: bool = False) -> list[str] | None:
    """Run `step(root)` in a process of its own; the changes that it made, or None where it died at number `at`.

    Raises RuntimeError where it failed in another way.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    seen = root.with_name(f"{root.name}.seen")
    seen.unlink(missing_ok=True)
    process = context.Process(target=_child, args=(step, root, at, torn, seen, dict(os.environ)))
    process.start()
    process.join()
    if process.exitcode == KILLED:
        return None
    if process.exitcode:
        raise RuntimeError(f"{step.__name__} ended with {process.exitcode} after a death at change {at}")
    return json.loads(seen.read_text())
