"""The lock of a run directory: one process at a time does a step there. It ends with the process, however that ends."""

import errno
import fcntl
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

    Raises StorageError when another process holds it, on this node or another one.
    """
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a")  # noqa: SIM115 (closed below, where errors are the caller's)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, stop it, or take another run_dir"
            raise StorageError(f"{folder}: another process {step}; {cure}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
