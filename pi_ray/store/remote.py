"""An adapter store behind a URL, with the methods of `local.py` and copies of what was asked for on this machine.

Names given to it are valid already (adapters.split_name); the content of the files may be hostile.
"""

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pi_ray.errors import AdapterError, ConfigError, CorruptArtifactError, StorageError
from pi_ray.run.artifact import MANIFEST, digest, staged, verify_artifact
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.store.disk_cache import DiskCache
from pi_ray.store.local import LATEST_FILE, VERSION
from pi_ray.store.verify import MAX_JSON_BYTES, check_listed_files, parse_json

log = logging.getLogger("ray.serve")
REFRESH_S, RETRY_S = 5.0, 60.0
NO_ANSWER = "the adapter store does not answer; come back later"


class StoreUnavailableError(AdapterError):
    """The store's service does not answer, or does not let this machine in."""


class RemoteStore:
    """A store behind a URL: s3://bucket/path, gs://bucket/path, hf://datasets/owner/name, file:///path.

    A version is copied once into a folder of this machine, named by the hash of its manifest, checked against it there,
    and renamed into place. Names, versions and JSON files are asked for again after REFRESH_S; while the store is out
    of reach, the last answer stands. A name that is not among the adapters is unknown without asking.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self._storage = ObjectStorage(self.url)
        except StorageError as error:
            raise ConfigError(f"store: {error}") from error
        self._clock: Callable[[], float] = time.monotonic
        self._answers: dict[tuple[str, ...], tuple[float, Any]] = {}  # question -> time and answer
        self._failed_at = float("-inf")  # when the store last did not answer
        self._cache = DiskCache()
        self._fetched: set[Path] = set()
        self._damaged: dict[Path, tuple[float, str]] = {}  # folder -> time and error
        self._fetching: dict[Path, threading.Lock] = {}  # folder -> held by who fetches it
        self._asking = threading.Lock()

    def names(self) -> list[str]:
        return self._recent(("names",), lambda: self._storage.list_folders(holding=LATEST_FILE))

    def has_adapter(self, name: str) -> bool:
        """As LocalStore's: a made-up name costs the store nothing and leaves nothing here."""
        return name in self.names()

    def versions(self, name: str) -> list[str]:
        """Versions of an adapter, oldest first. An upload that did not end is none."""
        found = self._recent(("", name), lambda: self._storage.list_folders(name, holding=MANIFEST))
        return sorted((v for v in found if VERSION.fullmatch(v)), key=lambda v: int(v[1:]))

    def read_json(self, name: str, file: str) -> dict[str, Any] | None:
        last = self._answers.get((name, file), (0, None))[1]
        data = self._recent((name, file), lambda: self._read(f"{name}/{file}"))
        if data != last:  # it may name a version that is new as well
            self._answers.pop(("", name), None)
        return None if data is None else parse_json(data, file)

    def write(self, name: str, file: str, text: str) -> None:
        """Write one object, which providers replace as a whole."""
        with self._translate_errors():
            self._storage.upload(text.encode(), f"{name}/{file}", atomic=False)
        self._answers.pop((name, file), None)
        self._answers.pop(("names",), None)

    def version_folder(self, name: str, version: str) -> Path | None:
        """This machine's copy of a version, fetched once; None where there is none. Raises AdapterError for damage."""
        manifest = self._manifest(name, version)
        if manifest is None:
            return None
        folder = self._cache.folder(digest(manifest), name, version)
        if not self._has(folder):
            with self._fetching.setdefault(folder, threading.Lock()):
                if not self._has(folder):
                    self._obtain(f"{name}/{version}", manifest, folder)
                    self._fetched.add(folder)
        self._cache.mark_used(folder)
        return folder

    def is_here(self, name: str, version: str) -> bool:
        """As LocalStore's: whether it was fetched, or is known to be missing."""
        manifest = self._manifest(name, version)
        return manifest is None or self._has(self._cache.folder(digest(manifest), name, version))

    def _has(self, folder: Path) -> bool:
        return folder in self._fetched and folder.is_dir()  # another process may have removed it to make room

    def _manifest(self, name: str, version: str) -> bytes | None:
        key = f"{name}/{version}/{MANIFEST}"
        return self._recent((name, version), lambda: self._read(key)) if version in self.versions(name) else None

    def find_version(self, name: str, fingerprint: str) -> str:
        """The newest version whose manifest has this fingerprint; "" for none."""
        for version in reversed(self.versions(name)):
            manifest = self._read(f"{name}/{version}/{MANIFEST}")
            if manifest and parse_json(manifest, MANIFEST).get("fingerprint") == fingerprint:
                return version
        return ""

    @contextmanager
    def stage_version(self, name: str, version: str, fingerprint: str) -> Iterator[Path]:
        """Yield a temporary folder; when all went well, upload its files, the manifest last: it makes the version."""
        self._cache.remove_old_uploads()
        folder = self._cache.uploads / uuid.uuid4().hex
        try:
            with staged(folder, fingerprint=fingerprint, adapter=name, version=version) as tmp:
                yield tmp
            with self._translate_errors():
                for path in sorted(folder.iterdir(), key=lambda p: p.name == MANIFEST):
                    self._storage.upload(path, f"{name}/{version}/{path.name}", atomic=False)
            self._answers.pop(("", name), None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Object storage has no locks: publish and release an adapter from one place at a time.

        What killed ones have left under another name is removed.
        """
        self._answers.clear()
        with self._translate_errors():
            self._storage.remove_leftovers(name)
        yield

    def _recent(self, question: tuple[str, ...], ask: Callable[[], Any]) -> Any:
        """The store's answer of the last REFRESH_S, else of now; the last one while it is out of reach.

        Where there is an earlier answer, one request at a time asks again, and the others take that answer. Without one
        nobody asks for REFRESH_S after the store was out of reach: those who wait hold threads that others need.
        """
        answered, now = self._answers.get(question), self._clock()
        at, value = answered or (now, None)
        if answered:
            recent = min(now - at, now - self._failed_at) < REFRESH_S
            if recent or not self._asking.acquire(blocking=False):
                return value
        elif now - self._failed_at < REFRESH_S:
            raise StoreUnavailableError(NO_ANSWER)
        try:
            with self._translate_errors():
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
            raise StoreUnavailableError(NO_ANSWER) from error

    def _obtain(self, key: str, manifest: bytes, folder: Path) -> None:
        """Fetch the folder unless it is whole. One that is damaged in the store is fetched again after RETRY_S."""
        at, message = self._damaged.get(folder, (-RETRY_S, ""))
        if self._clock() - at < RETRY_S:
            raise AdapterError(message)
        with suppress(CorruptArtifactError):
            verify_artifact(folder)
            return
        check_listed_files(manifest)
        try:
            with self._translate_errors():
                self._storage.fetch_folder(key, manifest, folder)
            self._cache.make_room(keep=folder)
        except (CorruptArtifactError, FileNotFoundError) as error:
            adapter, reason = f"adapter '{key.replace('/', '@')}'", str(error).rpartition("/")[2]  # no local path
            if self._cache.has_lost(folder, error):
                cure = "ask again, and raise PI_RAY_CACHE_GIB if this comes often"
                raise StoreUnavailableError(f"{adapter} was removed here while it was fetched; {cure}") from error
            message = f"{adapter} is not whole in the store: {reason}"
            self._damaged[folder] = (self._clock(), message)
            raise AdapterError(message) from error
