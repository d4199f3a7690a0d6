"""The cache of fetched adapters on this machine's disk, which its processes share: the least recently used ones go."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from pi_ray.errors import ConfigError
from pi_ray.models.base_files import cache_dir
from pi_ray.run.artifact import TEMPORARY, temporary_path

VARIABLE, DEFAULT_GIB = "PI_RAY_CACHE_GIB", 20.0
DAY_S = 86_400.0  # after which an upload is over, whatever became of its process


class DiskCache:
    """Folders `adapters/HASH/NAME/VERSION` of the cache, at most `limit` bytes of them."""

    def __init__(self) -> None:
        self.root, self.uploads = cache_dir() / "adapters", cache_dir() / "uploads"
        text = os.environ.get(VARIABLE) or str(DEFAULT_GIB)
        try:
            self.limit = float(text) * 2**30
        except ValueError:
            raise ConfigError(f"{VARIABLE}: {text!r} is no number of GiB") from None

    def folder(self, content: str, name: str, version: str) -> Path:
        """Where a version lies whose manifest has the hash `content`."""
        return self.root / content[:32] / name / version

    def mark_used(self, folder: Path) -> None:
        with suppress(OSError):
            os.utime(folder.parents[1])

    def make_room(self, keep: Path) -> None:
        """Remove the least recently used versions until the rest fits; never `keep`, which was just fetched, nor a
        folder into which another process fetches.
        """
        found = []
        for entry in os.scandir(self.root):
            with suppress(OSError):
                sizes = [path.lstat().st_size for path in Path(entry.path).rglob("*") if path.is_file()]
                found.append((entry.stat().st_mtime_ns, sum(sizes), Path(entry.path)))
        total = sum(size for _, size, _ in found)
        for _, size, folder in sorted(found):
            if total <= self.limit:
                return
            if not keep.is_relative_to(folder) and not _is_fetching(folder):
                total -= size
                gone = temporary_path(folder, "old")
                with suppress(OSError):  # another process has removed it
                    os.rename(folder, gone)
                    shutil.rmtree(gone, ignore_errors=True)

    def has_lost(self, folder: Path, error: Exception) -> bool:
        """Whether fetching into `folder` failed because a process of this machine has removed its parent."""
        path = getattr(error, "filename", None)
        return not folder.parent.is_dir() or (path is not None and Path(path).is_relative_to(self.root))

    def remove_old_uploads(self) -> None:
        """Remove what killed publications have left."""
        for entry in os.scandir(self.uploads) if self.uploads.is_dir() else ():
            with suppress(OSError):
                if time.time() - entry.stat().st_mtime > DAY_S:
                    shutil.rmtree(entry.path, ignore_errors=True)


def _is_fetching(folder: Path) -> bool:
    """Whether something is being fetched into a HASH folder; what a killed process left counts for a day."""
    for path in folder.glob("*/.*"):
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime < DAY_S:
                return True
    return False
