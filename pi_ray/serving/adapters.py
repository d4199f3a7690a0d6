"""The adapter store as serving sees it: a name -> a verified folder. Nothing from a request reaches the disk before the name is checked.

    store/<name>/latest.json            {"version": "v0002"}
    store/<name>/v0001, v0002, ...      adapter_model.safetensors, adapter_config.json, pi_ray.json, README.md, manifest.json

A folder in the store is treated as hostile until verified: it may have been copied from elsewhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi_ray.artifact import MANIFEST, digest, digest_file
from pi_ray.config import ModelConfig
from pi_ray.errors import AdapterError
from pi_ray.serving.verify import check, read_json

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(r"v[0-9]{4,9}")


class UnknownAdapterError(AdapterError):
    """No adapter of this name, or a name that no adapter can have."""


@dataclass(frozen=True)
class Adapter:
    """A verified adapter: `path` holds its files, `card` is its pi_ray.json."""

    name: str
    version: str
    path: Path
    card: dict[str, Any] = field(repr=False)


def split_name(spec: str) -> tuple[str, str]:
    """"name" or "name@v0002" -> (name, version or ""). Raises UnknownAdapterError for anything else; touches no file."""
    name, at, version = spec.partition("@")
    if not NAME.fullmatch(name) or (at and not VERSION.fullmatch(version)):
        raise UnknownAdapterError(f"no adapter can be named {spec[:80]!r}; a name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and may be followed by @v0001")
    return name, version


class AdapterStore:
    """Reads the store at `folder`. With `base`, adapters of any other base model are refused."""

    def __init__(self, folder: Path | str, base: ModelConfig | None = None):
        self.folder = Path(folder)
        self.base = base
        self._verified: dict[str, Adapter] = {}

    def names(self) -> list[str]:
        """Names that can be asked for, sorted. Their files are verified when they are opened, not here."""
        try:
            entries = list(os.scandir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False) and (Path(e.path) / "latest.json").is_file())

    def open(self, spec: str) -> Adapter:
        """The verified adapter for "name" or "name@v0002". Raises UnknownAdapterError, or AdapterError saying what is wrong with it."""
        name, version = split_name(spec)
        version = version or self._latest(name)
        path = Path(os.path.realpath(self.folder / name / version))
        if not path.is_relative_to(os.path.realpath(self.folder)):
            raise AdapterError(f"adapter '{name}': a symbolic link leads out of the store")
        if not path.is_dir():
            raise UnknownAdapterError(f"no adapter '{spec}' in the store")
        state = _state(path)
        if state not in self._verified:
            try:
                card = check(path, self.base)
            except AdapterError as error:
                raise AdapterError(f"adapter '{name}@{version}' is refused: {error}") from error
            self._verified[state] = Adapter(name, version, path, card)
        return self._verified[state]

    def _latest(self, name: str) -> str:
        path = Path(os.path.realpath(self.folder / name / "latest.json"))
        if not path.is_relative_to(os.path.realpath(self.folder)):
            raise AdapterError(f"adapter '{name}': a symbolic link leads out of the store")
        if not path.is_file():
            raise UnknownAdapterError(f"no adapter '{name}' in the store")
        version = read_json(path).get("version")
        if not isinstance(version, str) or not VERSION.fullmatch(version):
            raise AdapterError(f"adapter '{name}': latest.json names no version")
        return version


def _state(path: Path) -> str:
    """Hash of the manifest and of every file's size and times, so that a folder changed after its verification is verified again."""
    files = [(e.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for e in sorted(os.scandir(path), key=lambda e: e.name) if (s := e.stat(follow_symlinks=False))]
    manifest = path / MANIFEST
    return digest([str(path), files, digest_file(manifest) if manifest.is_file() else ""])
