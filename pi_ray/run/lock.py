"""The lock of a run directory: one process at a time asks, answers, prepares, trains or evaluates there.

It ends with the process, however that ends. Tuning at a service locks the directory closed/, and publishing the adapter
in the store; `report` only reads artifacts, which are whole or not there.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pi_ray.errors import StorageError
from pi_ray.run.artifact import remove_leftovers, translate_disk_errors

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # a network disk that has none; then there is no protection


@contextmanager
def run_lock(folder: Path, step: str) -> Iterator[None]:
    """Hold the lock of `folder` while `step` ("is preparing this run") goes on there; the file says so.

    What killed processes left half written in `folder` itself is removed first. Raises StorageError, with the other's
    step, when another process holds it, on this node or another one.
    """
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115 (closed below, where errors are the caller's)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, stop it, or take another run_dir"
            lock.seek(0)
            raise StorageError(f"{folder}: another process {lock.read() or step}; {cure}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        else:
            with translate_disk_errors(folder):
                remove_leftovers(folder)
        with suppress(OSError):  # a full disk
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), step.encode())
        yield


@contextmanager
def waiting_lock(file: Path) -> Iterator[None]:
    """Hold the lock `file`, whose folder is made where it is missing, once no other process has it."""
    with translate_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file, "w")  # noqa: SIM115 (closed below, where errors are the caller's)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
