"""The adapter store as serving sees it: a name -> a verified folder. Names are checked before any file is touched.

    store/<name>/latest.json     {"version": "v0002"}
    store/<name>/aliases.json    {"prod": {"version": "v0002", "canary": "v0003", "percent": 10, "before": ["v0001"]}}
    store/<name>/v0001, ...      adapter_model.safetensors, adapter_config.json, pi_ray.json (the card), README.md,
                                 manifest.json; prompt.json for the prompt guard, knows.json for `pi-ray knows`

The store is a folder or behind a URL (backends.py). Its content is treated as hostile until it is verified.
A name alone stands for its alias `prod`; while there is none, for the latest version.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.errors import AdapterError
from pi_ray.run.artifact import MANIFEST, digest, digest_file
from pi_ray.run.object_storage import is_url
from pi_ray.store.conversation_guard import ConversationGuard
from pi_ray.store.local import LATEST_FILE, VERSION, LocalStore
from pi_ray.store.prompt_guard import PROMPT_FILE, PromptGuard
from pi_ray.store.remote import RemoteStore, StoreUnavailableError
from pi_ray.store.verify import read_json, validate, verify_adapter

__all__ = [
    "NAME", "Adapter", "AdapterStore", "StoreUnavailableError", "UnknownAdapterError", "check_unchanged", "split_name",
]
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ALIAS = re.compile(r"(?!v[0-9])[a-z][a-z0-9_-]{0,31}")
ALIASES_FILE = "aliases.json"
DEFAULT_ALIAS = "prod"  # for which a name alone stands
LATEST = "latest"  # stands for the newest version
MAX_HISTORY = 20  # versions through which `--rollback` can go back
MAX_REFUSALS = 1000  # that are remembered
MAX_VERIFIED = 512  # adapters that are remembered: a long prompt's guard takes a megabyte
Version = Annotated[str, Field(pattern=f"^{VERSION.pattern}$")]


class UnknownAdapterError(AdapterError):
    """There is no adapter of this name, or no adapter can have it."""


@dataclass(frozen=True)
class Adapter:
    """A verified adapter: the folder of its files, its pi_ray.json, and its prompt guard where its prompt is known.

    `hash` is that of its manifest, which lists the files' hashes: whatever is cached of an adapter is kept under it.
    """

    name: str
    version: str
    path: Path
    hash: str
    card: dict[str, Any] = field(repr=False)
    guard: PromptGuard | ConversationGuard | None = field(default=None, repr=False, compare=False)

    @property
    def is_conversational(self) -> bool:
        """Whether it was trained on conversations, whose recurrent part is a system message and tools."""
        return bool(self.card["prompt"].get("conversation"))


@dataclass(frozen=True)
class Alias:
    """`version` answers, but for `percent` percent of requests `canary`. `before`: earlier versions, newest last."""

    version: Version
    canary: Annotated[str, Field(pattern=f"^({VERSION.pattern})?$")] = ""
    percent: Annotated[float, Field(ge=0, le=100, strict=True)] = 0.0
    before: tuple[Version, ...] = ()

    def pick(self, sticky_key: str) -> str:
        """The version that answers: always the same one for a key, and never the canary for an empty key.

        A higher percentage keeps the keys that had the canary already.
        """
        place = int(digest(f"{self.canary}:{sticky_key}")[:12], 16) / 16**12 * 100
        return self.canary if self.canary and sticky_key and place < self.percent else self.version

    def with_version(self, version: str) -> Self:
        """`version` for all requests. Ends a canary."""
        before = self.before if version == self.version else (*self.before, self.version)[-MAX_HISTORY:]
        return replace(self, version=version, canary="", percent=0.0, before=before)

    def rolled_back(self) -> Self:
        """The same without its canary; where there is none, the version before. Raises AdapterError without either."""
        if self.canary:
            return replace(self, canary="", percent=0.0)
        if not self.before:
            raise AdapterError("there is no earlier version to go back to; name one with --version")
        return replace(self, version=self.before[-1], before=self.before[:-1])


ALIASES = TypeAdapter(dict[str, Alias])


def split_name(spec: str) -> tuple[str, str]:
    """Split "name", "name@v0002" or "name@alias" at the "@", or raise UnknownAdapterError. No file is touched."""
    name, at, label = spec.partition("@")
    if not NAME.fullmatch(name) or (at and not VERSION.fullmatch(label) and not ALIAS.fullmatch(label)):
        rule = "1 to 64 of a-z, 0-9, '.', '_' and '-', and may be followed by @v0001 or @alias"
        raise UnknownAdapterError(f"no adapter can be named {spec[:80]!r}; a name is {rule}")
    return name, label


class AdapterStore:
    """Reads the store at `location`, a folder or a URL. With `base`, adapters of any other base model are refused."""

    def __init__(self, location: Path | str, base: ModelConfig | None = None):
        self.backend: LocalStore | RemoteStore
        self.backend = RemoteStore(str(location)) if is_url(location) else LocalStore(location)
        self.base = base
        # folder -> its state and content, of the MAX_VERIFIED that were asked for last
        self._verified: OrderedDict[Path, tuple[str, Adapter]] = OrderedDict()
        self._refused: dict[str, str] = {}

    def names(self) -> list[str]:
        """Names that can be asked for, sorted. Their files are verified when they are opened, not here."""
        return sorted(name for name in self.backend.names() if NAME.fullmatch(name))

    def open(self, spec: str, sticky_key: str = "") -> Adapter:
        """The verified adapter for "name", "name@v0002" or "name@alias". `sticky_key` decides whether a canary answers.

        Raises UnknownAdapterError, or AdapterError that says why the adapter is refused.
        """
        name, version = self.resolve(spec, sticky_key)
        path = self.backend.version_folder(name, version)
        if path is None:
            raise UnknownAdapterError(f"no adapter '{spec}' in the store")
        with replacement_refused(path):
            state = _folder_state(path)
            if state in self._refused:
                raise AdapterError(self._refused[state])
            known, adapter = self._verified.get(path, ("", None))
            if adapter is None or state != known:
                adapter = self._verify(name, version, path, state)
                check_unchanged(path, adapter.hash)
                self._verified[path] = state, adapter
                while len(self._verified) > MAX_VERIFIED:
                    with suppress(KeyError):  # another thread took it
                        self._verified.popitem(last=False)
            with suppress(KeyError):
                self._verified.move_to_end(path)
        return adapter

    def _verify(self, name: str, version: str, path: Path, state: str) -> Adapter:
        found = digest_file(path / MANIFEST) if (path / MANIFEST).is_file() else ""
        try:
            card = verify_adapter(path, self.base)
        except AdapterError as error:  # remembered until the folder changes, so that asking again costs nothing
            message = self._refused[state] = f"adapter '{name}@{version}' is refused: {error}"
            if len(self._refused) > MAX_REFUSALS:
                del self._refused[next(iter(self._refused))]
            raise AdapterError(message) from error
        file, wording = path / PROMPT_FILE, PromptConfig(**card["prompt"])
        guard = _make_guard(read_json(file), wording) if file.is_file() else None
        return Adapter(name, version, path, found, card, guard)

    def cold_version(self, spec: str, sticky_key: str = "") -> str:
        """name@version for which `spec` stands, where `open` must fetch or verify it and so may take long; else ""."""
        name, version = self.resolve(spec, sticky_key)
        is_known = self.backend.is_here(name, version) and self.backend.version_folder(name, version) in self._verified
        return "" if is_known else f"{name}@{version}"

    def resolve(self, spec: str, sticky_key: str = "") -> tuple[str, str]:
        """(name, version) for which `spec` stands now. The version's files are not read."""
        name, label = split_name(spec)
        if not self.backend.has_adapter(name):
            raise UnknownAdapterError(f"no adapter '{name}' in the store")
        if VERSION.fullmatch(label):
            return name, label
        if label == LATEST:
            return name, self.latest(name)
        alias = self.aliases(name).get(label or DEFAULT_ALIAS)
        if label and not alias:
            raise UnknownAdapterError(f"no alias '{label}' of an adapter '{name}' in the store")
        return name, alias.pick(sticky_key) if alias else self.latest(name)

    def aliases(self, name: str) -> dict[str, Alias]:
        """Name -> alias. Raises AdapterError where aliases.json is not as `pi-ray release` wrote it."""
        data = self.backend.read_json(name, ALIASES_FILE) or {}
        where = f"adapter '{name}': {ALIASES_FILE} (which 'pi-ray release' writes)"
        if not all(map(ALIAS.fullmatch, data)):
            raise AdapterError(f"{where} holds a name that no alias can have")
        return validate(ALIASES, data, where)

    def latest(self, name: str) -> str:
        """The newest published version. Raises UnknownAdapterError when there is none."""
        found = self.backend.read_json(name, LATEST_FILE)
        if found is None:
            raise UnknownAdapterError(f"no adapter '{name}' in the store")
        version = found.get("version")
        if not isinstance(version, str) or not VERSION.fullmatch(version):
            raise AdapterError(f"adapter '{name}': {LATEST_FILE} names no version")
        return version


def _make_guard(prompt: dict[str, Any], wording: PromptConfig) -> PromptGuard | ConversationGuard:
    return ConversationGuard(prompt) if wording.conversation else PromptGuard(prompt, wording)


def check_unchanged(folder: Path | str, manifest_hash: str) -> None:
    """Raise StoreUnavailableError unless `folder` is the one whose manifest had this hash, after its files were read.

    A version is replaced by renaming a whole folder into its place, so an unchanged manifest means unchanged files.
    """
    with replacement_refused(folder):
        if digest_file(Path(folder, MANIFEST)) == manifest_hash:
            return
    raise StoreUnavailableError(_replaced(folder))


@contextmanager
def replacement_refused(folder: Path | str) -> Iterator[None]:
    """A folder that goes away while its files are read is being replaced."""
    try:
        yield
    except FileNotFoundError:
        raise StoreUnavailableError(_replaced(folder)) from None


def _replaced(folder: Path | str) -> str:
    path = Path(folder)
    return f"adapter '{path.parent.name}@{path.name}' is being replaced; come back later"


def _folder_state(path: Path) -> str:
    """Hash of the manifest and of each file's size and times: a folder that was changed since is verified again."""
    stats = sorted((e.name, e.stat(follow_symlinks=False)) for e in os.scandir(path))
    files = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    manifest = path / MANIFEST
    return digest([str(path), files, digest_file(manifest) if manifest.is_file() else ""])
