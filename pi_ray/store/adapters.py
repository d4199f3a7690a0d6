"""The adapter store as serving sees it: a name -> a verified folder. Nothing from a request reaches the disk before the name is checked.

    store/<name>/latest.json            {"version": "v0002"}
    store/<name>/aliases.json           which version answers (aliases.py); written by `pi-ray release`
    store/<name>/v0001, v0002, ...      adapter_model.safetensors, adapter_config.json, pi_ray.json, prompt.json, README.md, manifest.json

It is a folder (folder.py) or behind a URL (remote.py). What is in it is treated as hostile until verified: it may have been copied from elsewhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.errors import AdapterError
from pi_ray.run.artifact import MANIFEST, digest, digest_file
from pi_ray.store.aliases import ALIAS, ALIASES, LATEST, NEWEST, SERVED, VERSION, Alias, parse
from pi_ray.store.local import Folder
from pi_ray.store.prompt_guard import PROMPT, Guard
from pi_ray.store.remote import Remote, StoreUnavailableError
from pi_ray.store.verify import check, read_json

__all__ = ["NAME", "Adapter", "AdapterStore", "StoreUnavailableError", "UnknownAdapterError", "split_name"]
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
REMEMBERED = 1000  # refusals


class UnknownAdapterError(AdapterError):
    """No adapter of this name, or a name that no adapter can have."""


@dataclass(frozen=True)
class Adapter:
    """A verified adapter: `path` holds its files, `card` is its pi_ray.json, `guard` knows its prompt where that was published."""

    name: str
    version: str
    path: Path
    card: dict[str, Any] = field(repr=False)
    guard: Guard | None = field(default=None, repr=False, compare=False)


def split_name(spec: str) -> tuple[str, str]:
    """"name", "name@v0002" or "name@alias" -> (name, version or alias or ""). Raises UnknownAdapterError for anything else; touches no file."""
    name, at, label = spec.partition("@")
    if not NAME.fullmatch(name) or (at and not VERSION.fullmatch(label) and not ALIAS.fullmatch(label)):
        raise UnknownAdapterError(f"no adapter can be named {spec[:80]!r}; a name is 1 to 64 of a-z, 0-9, '.', '_' and '-', and may be followed by @v0001 or @alias")
    return name, label


class AdapterStore:
    """Reads the store at `location`, a folder or a URL. With `base`, adapters of any other base model are refused."""

    def __init__(self, location: Path | str, base: ModelConfig | None = None):
        self.place: Folder | Remote = Remote(str(location)) if is_url(location) else Folder(location)
        self.base = base
        self._verified: dict[str, Adapter] = {}
        self._refused: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        """Where a store in a folder is."""
        return self.place.root

    def names(self) -> list[str]:
        """Names that can be asked for, sorted. Their files are verified when they are opened, not here."""
        return sorted(name for name in self.place.names() if NAME.fullmatch(name))

    def open(self, spec: str, ticket: str = "") -> Adapter:
        """The verified adapter for "name", "name@v0002" or "name@alias". Raises UnknownAdapterError, or AdapterError saying what is wrong with it.

        `ticket` decides whether a version on trial answers.
        """
        name, version = self.resolve(spec, ticket)
        path = self.place.version(name, version)
        if path is None:
            raise UnknownAdapterError(f"no adapter '{spec}' in the store")
        state = _state(path)
        if state in self._refused:
            raise AdapterError(self._refused[state])
        if state not in self._verified:
            self._verified[state] = self._verify(name, version, path, state)
        return self._verified[state]

    def resolve(self, spec: str, ticket: str = "") -> tuple[str, str]:
        """(name, version) of what `spec` means now. The version's files are not looked at."""
        name, label = split_name(spec)
        if not self.place.knows(name):
            raise UnknownAdapterError(f"no adapter '{name}' in the store")
        if VERSION.fullmatch(label):
            return name, label
        if label == NEWEST:
            return name, self.latest(name)
        alias = self.aliases(name).get(label or SERVED)
        if label and not alias:
            raise UnknownAdapterError(f"no alias '{label}' of an adapter '{name}' in the store")
        return name, alias.pick(ticket) if alias else self.latest(name)

    def aliases(self, name: str) -> dict[str, Alias]:
        return parse(self.place.read(name, ALIASES) or {}, name)

    def latest(self, name: str) -> str:
        """The newest published version. Raises UnknownAdapterError when there is none."""
        found = self.place.read(name, LATEST)
        if found is None:
            raise UnknownAdapterError(f"no adapter '{name}' in the store")
        version = found.get("version")
        if not isinstance(version, str) or not VERSION.fullmatch(version):
            raise AdapterError(f"adapter '{name}': {LATEST} names no version")
        return version

    def _verify(self, name: str, version: str, path: Path, state: str) -> Adapter:
        """Every check there is. A refusal is remembered until the folder changes, so that asking again costs nothing."""
        try:
            card = check(path, self.base)
        except AdapterError as error:
            message = f"adapter '{name}@{version}' is refused: {error}"
            self._refused[state] = message
            if len(self._refused) > REMEMBERED:
                del self._refused[next(iter(self._refused))]
            raise AdapterError(message) from error
        guard = Guard(read_json(path / PROMPT), PromptConfig(**card["prompt"])) if (path / PROMPT).is_file() else None
        return Adapter(name, version, path, card, guard)


def is_url(location: Path | str) -> bool:
    return "://" in str(location)


def _state(path: Path) -> str:
    """Hash of the manifest and of every file's size and times, so that a folder changed after its verification is verified again."""
    files = [(e.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for e in sorted(os.scandir(path), key=lambda e: e.name) if (s := e.stat(follow_symlinks=False))]
    manifest = path / MANIFEST
    return digest([str(path), files, digest_file(manifest) if manifest.is_file() else ""])
