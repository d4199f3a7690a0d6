"""An adapter store behind a URL: s3://bucket/path, gs://bucket/path, hf://datasets/owner/name, file:///path.

A version is copied once into a folder of this machine, named by the hash of its manifest, checked against it there, and
renamed into place. The names, the versions, aliases.json and latest.json are asked for again after REFRESH_S; while the
store is out of reach, the last answer stands. A name that is not among the adapters is unknown without asking.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.errors import AdapterError, ConfigError, CorruptArtifactError, StorageError
from pi_ray.models import cache_dir
from pi_ray.run.artifact import MANIFEST, digest, staged, temporary_path, translate_disk_errors, verify_artifact
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.store.aliases import LATEST_FILE, VERSION
from pi_ray.store.verify import MAX_JSON_BYTES, MAX_WEIGHT_BYTES, SUFFIXES, WEIGHTS_FILE, parse_json

log = logging.getLogger("ray.serve")
REFRESH_S, RETRY_S = 5.0, 60.0
MAX_FILES = 16  # of an adapter
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class StoreUnavailableError(AdapterError):
    """The store's service does not answer, or does not let this machine in."""


class RemoteStore:
    """The same methods as local.LocalStore. Names given to it are valid already; the store's files may be hostile."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self._storage = ObjectStorage(self.url)
        except StorageError as error:
            raise ConfigError(f"store: {error}") from error
        self._clock: Callable[[], float] = time.monotonic
        self._answers: dict[tuple[str, ...], tuple[float, Any]] = {}  # question -> time and answer
        self._failed_at = float("-inf")  # when the store last did not answer
        self._fetched: set[Path] = set()
        self._damaged: dict[Path, tuple[float, str]] = {}  # folder -> time and error
        self._fetching, self._asking = threading.Lock(), threading.Lock()

    def names(self) -> list[str]:
        """Names of the folders that have a latest version."""
        return self._recent(("names",), lambda: self._folders("", LATEST_FILE))

    def has_adapter(self, name: str) -> bool:
        """As LocalStore's; a made-up name costs the store nothing and leaves nothing here."""
        return name in self.names()

    def versions(self, name: str) -> list[str]:
        """Versions of an adapter, oldest first. An upload that did not end is none."""
        found = self._recent(("", name), lambda: self._folders(name, MANIFEST))
        return sorted((v for v in found if VERSION.fullmatch(v)), key=lambda v: int(v[1:]))

    def read_json(self, name: str, file: str) -> dict[str, Any] | None:
        """A JSON object beside the versions, or None."""
        last = self._answers.get((name, file), (0, None))[1]
        data = self._recent((name, file), lambda: self._read(f"{name}/{file}"))
        if data != last:  # it may name a version that is new as well
            self._answers.pop(("", name), None)
        return None if data is None else parse_json(data, file)

    def write(self, name: str, file: str, text: str) -> None:
        """Write one object, which providers replace as a whole."""
        with self._translate_errors():
            self._storage.write(text.encode(), f"{name}/{file}", atomic=False)
        self._answers.pop((name, file), None)
        self._answers.pop(("names",), None)

    def version_folder(self, name: str, version: str) -> Path | None:
        """This machine's copy of a version, fetched the first time; None when there is no such version.

        Raises AdapterError for one that is damaged.
        """
        if version not in self.versions(name):
            return None
        manifest = self._recent((name, version), lambda: self._read(f"{name}/{version}/{MANIFEST}"))
        if manifest is None:
            return None
        folder = cache_dir() / "adapters" / digest(manifest)[:32] / name / version
        if folder not in self._fetched:
            with self._fetching:
                self._obtain(f"{name}/{version}", manifest, folder)
        return folder

    def find_version(self, name: str, fingerprint: str) -> str:
        """The newest version made from `fingerprint`, or ""."""
        for version in reversed(self.versions(name)):
            manifest = self._read(f"{name}/{version}/{MANIFEST}")
            if manifest and parse_json(manifest, MANIFEST).get("fingerprint") == fingerprint:
                return version
        return ""

    @contextmanager
    def stage_version(self, name: str, version: str, fingerprint: str) -> Iterator[Path]:
        """Yield a temporary folder; when all went well, upload its files, the manifest last: it makes the version."""
        scratch = cache_dir() / "uploads" / uuid.uuid4().hex
        try:
            with staged(scratch / version, fingerprint=fingerprint, adapter=name, version=version) as tmp:
                yield tmp
            with self._translate_errors():
                for path in sorted((scratch / version).iterdir(), key=lambda p: p.name == MANIFEST):
                    self._storage.upload(path, f"{name}/{version}/{path.name}", atomic=False)
            self._answers.pop(("", name), None)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Object storage has no locks: publish and release an adapter from one place at a time."""
        self._answers.clear()
        yield

    def _folders(self, inside: str, holding: str) -> list[str]:
        with self._translate_errors():
            return self._storage.list_folders(inside, holding=holding)

    def _recent(self, question: tuple[str, ...], ask: Callable[[], Any]) -> Any:
        """The store's answer of the last REFRESH_S, else of now; the last one while it is out of reach.

        Where there is an earlier answer, one request at a time asks again, and the others take that answer.
        """
        answered, now = self._answers.get(question), self._clock()
        at, value = answered or (now, None)
        if answered:
            recent = min(now - at, now - self._failed_at) < REFRESH_S
            if recent or not self._asking.acquire(blocking=False):
                return value
        try:
            value = ask()
        except StoreUnavailableError:
            self._failed_at = self._clock()
            if not answered:
                raise
            log.warning("the adapter store does not answer; its last answer still holds")
        finally:
            if answered:
                self._asking.release()
        self._answers[question] = (self._clock(), value)
        return value

    def _read(self, key: str) -> bytes | None:
        """A small file whole, or None. Raises AdapterError for one above MAX_JSON_BYTES."""
        with self._translate_errors():
            data = self._storage.read(key, MAX_JSON_BYTES + 1)
        if data and len(data) > MAX_JSON_BYTES:
            raise AdapterError(f"{key.rpartition('/')[2]} is too large (more than {MAX_JSON_BYTES} bytes)")
        return data

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn providers' errors into StoreUnavailableError, which shows no address. FileNotFoundError passes."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            log.error("adapter store %s: %s", self.url.partition("?")[0], error)
            raise StoreUnavailableError("the adapter store does not answer; come back later") from error

    def _obtain(self, key: str, manifest: bytes, folder: Path) -> None:
        """Fetch the folder unless it is whole. One that is damaged in the store is fetched again after RETRY_S."""
        at, message = self._damaged.get(folder, (-RETRY_S, ""))
        if self._clock() - at < RETRY_S:
            raise AdapterError(message)
        try:
            if folder not in self._fetched and not _is_whole(folder):
                self._fetch(key, manifest, folder)
            self._fetched.add(folder)
        except StoreUnavailableError:
            raise
        except AdapterError as error:
            self._damaged[folder] = (self._clock(), str(error))
            raise

    def _fetch(self, key: str, manifest: bytes, folder: Path) -> None:
        """Copy a version beside its final name, check it against the manifest that was read, and rename it."""
        tmp = temporary_path(folder)
        with translate_disk_errors(folder):
            tmp.mkdir(parents=True)
            try:
                for name, size in _listed_files(manifest).items():
                    with self._translate_errors():
                        if not self._storage.fetch(f"{key}/{name}", tmp / name, size):
                            raise AdapterError(f"{name}: it is larger than the {size} bytes that {MANIFEST} gives")
                (tmp / MANIFEST).write_bytes(manifest)
                verify_artifact(tmp)
                shutil.rmtree(folder, ignore_errors=True)
                tmp.rename(folder)
            except (CorruptArtifactError, FileNotFoundError) as error:
                reason = str(error).rpartition("/")[2]  # without the path on this machine
                raise AdapterError(f"adapter '{key.replace('/', '@')}' is not whole in the store: {reason}") from error
            finally:
                shutil.rmtree(tmp, ignore_errors=True)


def _listed_files(manifest: bytes) -> dict[str, int]:
    """File name -> bytes of a manifest. Names are checked before any of them becomes a path."""
    files = parse_json(manifest, MANIFEST).get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= MAX_FILES:
        raise AdapterError(f"{MANIFEST} does not list the files of an adapter")
    sizes = {}
    for name, recorded in files.items():
        if not FILE.fullmatch(name) or name == MANIFEST or Path(name).suffix not in SUFFIXES:
            problem = "names a file that no adapter has; weights must be safetensors, never a pickle"
            raise AdapterError(f"{MANIFEST} {problem}")
        recorded = recorded if isinstance(recorded, dict) else {}
        size, limit = recorded.get("bytes"), MAX_WEIGHT_BYTES if name == WEIGHTS_FILE else MAX_JSON_BYTES
        if not isinstance(recorded.get("sha256"), str) or type(size) is not int or not 0 <= size <= limit:
            raise AdapterError(f"{name} is too large, or {MANIFEST} gives no size and hash")
        sizes[name] = size
    return sizes


def _is_whole(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(verify_artifact(folder))
    except CorruptArtifactError:
        return False
