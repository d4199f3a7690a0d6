"""An adapter store in a folder that every replica can read. Symbolic links that lead out of it are refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.errors import AdapterError, CorruptArtifactError
from pi_ray.run.artifact import staged, translate_disk_errors, verify_artifact, write_atomic
from pi_ray.store.aliases import LATEST_FILE, VERSION
from pi_ray.store.verify import read_json


class LocalStore:
    """Names given to it are valid already (adapters.split_name); the content of its files may be hostile."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self._parsed: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}  # file -> its state on disk and content

    def names(self) -> list[str]:
        """Names of the folders that have a latest version."""
        try:
            entries = list(os.scandir(self.root))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [e.name for e in entries if e.is_dir(follow_symlinks=False) and (Path(e.path) / LATEST_FILE).is_file()]

    def has_adapter(self, name: str) -> bool:
        """Whether there may be an adapter of this name."""
        return (self.root / name).is_dir()

    def versions(self, name: str) -> list[str]:
        """Versions of an adapter, oldest first."""
        folder = self.root / name
        found = [p.name for p in folder.iterdir() if VERSION.fullmatch(p.name)] if folder.is_dir() else []
        return sorted(found, key=lambda v: int(v[1:]))

    def read_json(self, name: str, file: str) -> dict[str, Any] | None:
        """A JSON object beside the versions, or None. Parsed only when the file changed: every request needs it."""
        path = self._path(name, file)
        try:
            info = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        state = (info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino)
        if self._parsed.get(path, ((), {}))[0] != state:
            self._parsed[path] = (state, read_json(path))
        return self._parsed[path][1]

    def write(self, name: str, file: str, text: str) -> None:
        write_atomic(self.root / name / file, text)

    def version_folder(self, name: str, version: str) -> Path | None:
        """The folder of a version, or None when there is none."""
        path = self._path(name, version)
        return path if path.is_dir() else None

    def find_version(self, name: str, fingerprint: str) -> str:
        """The newest undamaged version made from `fingerprint`, or ""."""
        for version in reversed(self.versions(name)):
            try:
                if verify_artifact(self.root / name / version).get("fingerprint") == fingerprint:
                    return version
            except CorruptArtifactError:
                continue  # left for its owner to look at; serving refuses it
        return ""

    @contextmanager
    def stage_version(self, name: str, version: str, fingerprint: str) -> Iterator[Path]:
        """Yield a temporary folder that becomes the version when all went well."""
        with staged(self.root / name / version, fingerprint=fingerprint, adapter=name, version=version) as tmp:
            yield tmp

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process write an adapter at a time, so that two do not take the same version number."""
        folder = self.root / name
        with translate_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below, where errors are the caller's)
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _path(self, name: str, part: str) -> Path:
        path = Path(os.path.realpath(self.root / name / part))
        if not path.is_relative_to(os.path.realpath(self.root)):
            raise AdapterError(f"adapter '{name}': a symbolic link leads out of the store")
        return path
