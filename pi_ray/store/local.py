"""A store in a folder that every replica can read. Symbolic links that lead out of it are refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.errors import AdapterError, CorruptArtifactError
from pi_ray.run.artifact import staged, verify, write_atomic, writing
from pi_ray.store.aliases import LATEST, VERSION
from pi_ray.store.verify import read_json


class Folder:
    """Names given to it are valid already (adapters.split_name); what stands in its files is not."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self._read: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}

    def names(self) -> list[str]:
        """Folders that have a latest version."""
        try:
            entries = list(os.scandir(self.root))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [e.name for e in entries if e.is_dir(follow_symlinks=False) and (Path(e.path) / LATEST).is_file()]

    def knows(self, name: str) -> bool:
        """Whether there may be an adapter of this name."""
        return (self.root / name).is_dir()

    def versions(self, name: str) -> list[str]:
        """Versions of an adapter, oldest first."""
        folder = self.root / name
        found = [p.name for p in folder.iterdir() if VERSION.fullmatch(p.name)] if folder.is_dir() else []
        return sorted(found, key=lambda v: int(v[1:]))

    def read(self, name: str, file: str) -> dict[str, Any] | None:
        """A JSON object beside the versions, or None. Parsed again only when the file changed: it is read for every request."""
        path = self._inside(name, file)
        try:
            info = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        state = (info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino)
        if self._read.get(path, ((), {}))[0] != state:
            self._read[path] = (state, read_json(path))
        return self._read[path][1]

    def write(self, name: str, file: str, text: str) -> None:
        write_atomic(self.root / name / file, text)

    def version(self, name: str, version: str) -> Path | None:
        """The folder of a version, or None when there is none."""
        path = self._inside(name, version)
        return path if path.is_dir() else None

    def find(self, name: str, fingerprint: str) -> str:
        """The newest undamaged version made from `fingerprint`, or ""."""
        for version in reversed(self.versions(name)):
            try:
                if verify(self.root / name / version).get("fingerprint") == fingerprint:
                    return version
            except CorruptArtifactError:
                continue  # left for its owner to look at; serving refuses it
        return ""

    @contextmanager
    def stage(self, name: str, version: str, fingerprint: str) -> Iterator[Path]:
        """A temporary folder that becomes the version when all went well."""
        with staged(self.root / name / version, fingerprint=fingerprint, adapter=name, version=version) as tmp:
            yield tmp

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One writer of an adapter at a time, so that two do not take the same version number. The lock goes with the process."""
        folder = self.root / name
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below, outside of `writing`)
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _inside(self, name: str, part: str) -> Path:
        path = Path(os.path.realpath(self.root / name / part))
        if not path.is_relative_to(os.path.realpath(self.root)):
            raise AdapterError(f"adapter '{name}': a symbolic link leads out of the store")
        return path
