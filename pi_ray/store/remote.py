"""A store behind a URL: s3://bucket/path, gs://bucket/path, hf://datasets/owner/name, file:///path, by pyarrow's file systems (hf by huggingface_hub's).

A version is copied once into a folder of this machine, named by the hash of its manifest, checked against it there, and renamed into place. Credentials
are where each provider's own tools look for them. Which adapters and versions there are, and what aliases and latest.json say, is asked again after
REFRESH_S; while the store is out of reach, the last answer stands. A name that is not among the adapters is unknown without asking.
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

from pi_ray.errors import AdapterError, ConfigError, CorruptArtifactError
from pi_ray.models import cache_dir
from pi_ray.run.artifact import MANIFEST, digest, staged, verify, writing
from pi_ray.store.aliases import LATEST, VERSION
from pi_ray.store.verify import MAX_JSON_BYTES, MAX_WEIGHT_BYTES, SUFFIXES, WEIGHTS, parse_json

log = logging.getLogger("ray.serve")
REFRESH_S, RETRY_S = 5.0, 60.0
MAX_FILES = 16
PIECE = 1 << 20
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class StoreUnavailableError(AdapterError):
    """The store's service does not answer, or does not let us in."""


class Remote:
    """As folder.Folder. Names given to it are valid already; what the store's files say is not, and is bounded before it is kept."""

    def __init__(self, url: str, refresh_s: float = REFRESH_S, clock: Callable[[], float] = time.monotonic):
        self.url = url.rstrip("/")
        self._files, self._root = file_system(self.url)
        self._refresh_s = refresh_s
        self._clock = clock
        self._known: dict[tuple[str, ...], tuple[float, Any]] = {}
        self._whole: set[Path] = set()
        self._failed = float("-inf")  # when the store last did not answer
        self._damaged: dict[Path, tuple[float, str]] = {}
        self._fetching, self._asking = threading.Lock(), threading.Lock()

    def names(self) -> list[str]:
        """Folders that have a latest version."""
        return self._recent(("names",), lambda: self._folders("", LATEST))

    def knows(self, name: str) -> bool:
        """As Folder.knows; a name that somebody made up costs the store nothing and leaves nothing here."""
        return name in self.names()

    def versions(self, name: str) -> list[str]:
        """Versions of an adapter, oldest first. An upload that did not end is none."""
        found = self._recent(("", name), lambda: self._folders(name, MANIFEST))
        return sorted((v for v in found if VERSION.fullmatch(v)), key=lambda v: int(v[1:]))

    def read(self, name: str, file: str) -> dict[str, Any] | None:
        """A JSON object beside the versions, or None."""
        before = self._known.get((name, file), (0, None))[1]
        data = self._recent((name, file), lambda: self._bytes(f"{name}/{file}", MAX_JSON_BYTES))
        if data != before:  # it may name a version that is new as well
            self._known.pop(("", name), None)
        return None if data is None else parse_json(data, file)

    def write(self, name: str, file: str, text: str) -> None:
        """One object, which providers replace as a whole."""
        with self._reached():
            self._files.create_dir(f"{self._root}/{name}", recursive=True)
            with self._files.open_output_stream(f"{self._root}/{name}/{file}") as f:
                f.write(text.encode())
        self._known.pop((name, file), None)
        self._known.pop(("names",), None)

    def version(self, name: str, version: str) -> Path | None:
        """This machine's copy of a version, which is fetched the first time; None when there is none. Raises AdapterError for one that is damaged."""
        if version not in self.versions(name):
            return None
        manifest = self._recent((name, version), lambda: self._bytes(f"{name}/{version}/{MANIFEST}", MAX_JSON_BYTES))
        if manifest is None:
            return None
        folder = cache_dir() / "adapters" / digest(manifest)[:32] / name / version
        if folder not in self._whole:
            with self._fetching:
                self._obtain(f"{name}/{version}", manifest, folder)
        return folder

    def find(self, name: str, fingerprint: str) -> str:
        """The newest version made from `fingerprint`, or ""."""
        manifests = ((v, self._bytes(f"{name}/{v}/{MANIFEST}", MAX_JSON_BYTES)) for v in reversed(self.versions(name)))
        return next((v for v, data in manifests if data and parse_json(data, MANIFEST).get("fingerprint") == fingerprint), "")

    @contextmanager
    def stage(self, name: str, version: str, fingerprint: str) -> Iterator[Path]:
        """A temporary folder whose files are uploaded when all went well, the manifest last: without it there is no version."""
        place = cache_dir() / "uploads" / uuid.uuid4().hex
        try:
            with staged(place / version, fingerprint=fingerprint, adapter=name, version=version) as tmp:
                yield tmp
            with self._reached():
                target = f"{self._root}/{name}/{version}"
                self._files.create_dir(target, recursive=True)
                for path in sorted((place / version).iterdir(), key=lambda p: p.name == MANIFEST):
                    with open(path, "rb") as f, self._files.open_output_stream(f"{target}/{path.name}") as out:
                        shutil.copyfileobj(f, out, PIECE)
            self._known.pop(("", name), None)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Object stores have no locks: publish and release an adapter from one place at a time."""
        self._known.clear()
        yield

    def _folders(self, inside: str, file: str) -> list[str]:
        """Names of the folders in `inside` that hold `file`."""
        from pyarrow.fs import FileSelector, FileType

        place = f"{self._root}/{inside}".rstrip("/")
        with self._reached():
            found = self._files.get_file_info(FileSelector(place, allow_not_found=True))
            names = [info.base_name for info in found if info.type == FileType.Directory]
            infos = self._files.get_file_info([f"{place}/{name}/{file}" for name in names]) if names else []
        return [name for name, info in zip(names, infos, strict=True) if info.is_file]

    def _recent(self, key: tuple[str, ...], ask: Callable[[], Any]) -> Any:
        """What the store said within the last REFRESH_S, or says now; what it said last while it does not answer. Of what is known one request at a time asks again."""
        at, value = self._known.get(key, (None, None))
        known, now = at is not None, self._clock()
        if known and (min(now - at, now - self._failed) < self._refresh_s or not self._asking.acquire(blocking=False)):
            return value
        try:
            value = ask()
        except StoreUnavailableError:
            self._failed = self._clock()
            if not known:
                raise
            log.warning("the adapter store does not answer; what it said last still holds")
        finally:
            if known:
                self._asking.release()
        self._known[key] = (self._clock(), value)
        return value

    def _bytes(self, path: str, limit: int) -> bytes | None:
        """A small file whole, or None."""
        try:
            with self._reached(), self._files.open_input_stream(f"{self._root}/{path}") as f:
                data = f.read(limit + 1)
        except FileNotFoundError:
            return None
        if len(data) > limit:
            raise AdapterError(f"{path.rsplit('/', 1)[-1]} is too large (more than {limit} bytes)")
        return data

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn what providers raise into StoreUnavailableError, which tells a client no address. A missing file stays FileNotFoundError."""
        handler = getattr(self._files, "handler", None)
        if handler is not None:  # fsspec remembers listings for ever
            handler.fs.invalidate_cache()
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            log.error("adapter store %s: %s", self.url.partition("?")[0], error)
            raise StoreUnavailableError("the adapter store does not answer; come back later") from error

    def _obtain(self, path: str, manifest: bytes, folder: Path) -> None:
        """Have the folder, whole. One that the store has damaged is asked for again after RETRY_S, not with every request."""
        at, message = self._damaged.get(folder, (-RETRY_S, ""))
        if self._clock() - at < RETRY_S:
            raise AdapterError(message)
        try:
            if folder not in self._whole and not _is_whole(folder):
                self._fetch(path, manifest, folder)
            self._whole.add(folder)
        except StoreUnavailableError:
            raise
        except AdapterError as error:
            self._damaged[folder] = (self._clock(), str(error))
            raise

    def _fetch(self, path: str, manifest: bytes, folder: Path) -> None:
        """Copy a version beside its final name, check it against the manifest that was read, and rename it."""
        tmp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        with writing(folder):
            tmp.mkdir(parents=True)
            try:
                for name, size in _listed(manifest).items():
                    self._copy(f"{path}/{name}", tmp / name, size)
                (tmp / MANIFEST).write_bytes(manifest)
                verify(tmp)
                shutil.rmtree(folder, ignore_errors=True)
                tmp.rename(folder)
            except (CorruptArtifactError, FileNotFoundError) as error:
                raise AdapterError(f"adapter '{path.replace('/', '@')}' is not whole in the store: {str(error).rpartition('/')[2]}") from error
            finally:
                shutil.rmtree(tmp, ignore_errors=True)

    def _copy(self, path: str, to: Path, size: int) -> None:
        """Never more than the `size` that the manifest gives."""
        left = size
        with self._reached(), self._files.open_input_stream(f"{self._root}/{path}") as f, open(to, "wb") as out:
            while data := f.read(min(PIECE, left + 1)):
                left -= len(data)
                if left < 0:
                    raise AdapterError(f"{to.name}: it is larger than the {size} bytes that {MANIFEST} gives")
                out.write(data)


def file_system(url: str) -> tuple[Any, str]:
    """pyarrow's file system and the path in it. Raises ConfigError for a URL that it does not know."""
    from pyarrow.fs import FileSystem

    try:
        files, path = FileSystem.from_uri(url)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"store: {url.partition('?')[0]} cannot be opened ({str(error).splitlines()[0]}); take a folder, s3://, gs://, hf:// or file://") from error
    if not path.strip("/"):
        raise ConfigError(f"store: {url} names no place; give a bucket and a path, as in s3://bucket/adapters, gs://, hf:// or file://")
    return files, path.rstrip("/")


def _listed(manifest: bytes) -> dict[str, int]:
    """File name -> bytes of a manifest. Names are checked before any of them becomes a path."""
    files = parse_json(manifest, MANIFEST).get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= MAX_FILES:
        raise AdapterError(f"{MANIFEST} does not list the files of an adapter")
    sizes = {}
    for name, recorded in files.items():
        recorded = recorded if isinstance(recorded, dict) else {}
        size = recorded.get("bytes")
        if not FILE.fullmatch(name) or name == MANIFEST or Path(name).suffix not in SUFFIXES:
            raise AdapterError(f"{MANIFEST} names a file that no adapter has; weights must be safetensors, never a pickle")
        if not isinstance(recorded.get("sha256"), str) or type(size) is not int or not 0 <= size <= (MAX_WEIGHT_BYTES if name == WEIGHTS else MAX_JSON_BYTES):
            raise AdapterError(f"{name} is too large, or {MANIFEST} gives no size and hash")
        sizes[name] = size
    return sizes


def _is_whole(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(verify(folder))
    except CorruptArtifactError:
        return False
