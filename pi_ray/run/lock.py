"""The lock of a run directory: one process at a time does a step there. It ends with the process, however that ends."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pi_ray.errors import StorageError
from pi_ray.run.artifact import translate_disk_errors

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # a network disk that has none; then there is no protection


@contextmanager
def run_lock(folder: Path, step: str) -> Iterator[None]:
    """Hold the lock of `folder` while `step` ("is preparing this run") goes on there.

    Raises StorageError, with the other's host and process id, when another process holds it.
    """
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (closed below, where errors are the caller's)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read(200).strip() or "another process"
            raise StorageError(f"{folder}: {who} {step}; wait for it, stop it, or take another run_dir") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        lock.truncate(0)
        lock.write(f"another process (pid {os.getpid()} on {socket.gethostname()})")
        lock.flush()
        yield
