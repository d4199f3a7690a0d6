"""An adapter store in a folder, which publisher and replicas share. `remote.py` is one behind a URL.

Names given to both are valid already (adapters.split_name); the content of the files may be hostile.
"""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from pi_ray.errors import AdapterError, CorruptArtifactError
from pi_ray.run.artifact import read_manifest, remove_leftovers, staged, verify_artifact, write_atomic
from pi_ray.run.lock import LOCK, waiting_lock
from pi_ray.store.verify import read_json

LATEST_FILE = "latest.json"
VERSION = re.compile(r"v[0-9]{4,9}")


class LocalStore:
    """A folder that every replica can read. Symbolic links that lead out of it are refused."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self._parsed: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}  # file -> its state on disk and content

    def names(self) -> list[str]:
        """Names of the folders that have a latest version."""
        entries = os.scandir(self.root) if self.root.is_dir() else ()
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

    def is_here(self, name: str, version: str) -> bool:
        """Whether `version_folder` answers without fetching anything."""
        return True

    def find_version(self, name: str, fingerprint: str) -> str:
        """The newest whole version with this fingerprint; "" for none. A damaged one is left for its owner."""
        for version in reversed(self.versions(name)):
            folder = self.root / name / version
            with suppress(CorruptArtifactError):
                if (read_manifest(folder) or {}).get("fingerprint") == fingerprint:
                    verify_artifact(folder)
                    return version
        return ""

    def stage_version(self, name: str, version: str, fingerprint: str) -> AbstractContextManager[Path]:
        """A temporary folder that becomes the version when all went well. Only under `lock`."""
        return staged(self.root / name / version, fingerprint=fingerprint, adapter=name, version=version)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process write an adapter at a time, so that two do not take the same version number.

        What killed ones have left is removed.
        """
        folder = self.root / name
        with waiting_lock(folder / LOCK):
            remove_leftovers(folder)
            yield

    def _path(self, name: str, part: str) -> Path:
        path = Path(os.path.realpath(self.root / name / part))
        if not path.is_relative_to(os.path.realpath(self.root)):
            raise AdapterError(f"adapter '{name}': a symbolic link leads out of the store")
        return path
