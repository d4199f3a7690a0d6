"""Storage sync: a run directory on object storage, for nodes that share no disk, each with a copy of its own.

Files that are written into the copy are uploaded under the same name, and what others have uploaded is fetched before
work starts; a file that was written here and could not be uploaded is kept. A reader never has half of anything:
    an artifact (a folder with a manifest)   its old manifest is removed, its files are sent, its new manifest last
    a file                                   sent under another name and moved, and then its hash (NAME.sha256)
"""

import fcntl
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pi_ray.cluster.storage_lease import StorageLease
from pi_ray.errors import CorruptArtifactError, StorageError
from pi_ray.run import artifact
from pi_ray.run.artifact import CORRUPT, MANIFEST, digest, digest_file, temporary_path
from pi_ray.run.lock import LOCK
from pi_ray.run.object_storage import ObjectStorage, is_temporary

HASH = ".sha256"
LEASE = "train.owner"
ATTEMPTS = 3  # an artifact may be replaced while it is fetched
STATE = ".mirror.json"  # key -> hash of what is the same here and on storage; its lock serves the processes of a node
LOCAL_ONLY = {"ray", STATE, LOCK, LEASE}  # names that stay on this node, are Ray's, or are written in another way
ADVICE = "what was sent before is whole, and the same command goes on from it"


class StorageSync:
    """The run directory `local` and its copy on object storage."""

    def __init__(self, local: Path, storage: ObjectStorage):
        self.local, self.storage = local, storage
        self.lease: StorageLease | None = None  # that of the group of workers which this process belongs to
        self.known: set[str] = set()  # keys seen here: only these are removed on storage when they are gone here
        self._sending: Future[None] | None = None  # a checkpoint's way to storage, under way or not asked about since

    @contextmanager
    def attach_driver(self) -> Iterator[None]:
        """Fetch the run directory, send what this process writes meanwhile, and the rest when all went well."""
        self.pull()
        artifact.write_listeners.append(self.push)
        _driver_syncs.append(self)
        try:
            yield
        finally:
            _driver_syncs.remove(self)
            artifact.write_listeners.remove(self.push)
        self.push_changes()

    def attach_worker(self, work: str = "") -> None:
        """Fetch the run directory, once for each id of `work`, and from now on send what this process writes."""
        if work in _started_work:
            return
        self.pull(unfinished=False)
        if work:
            _started_work.add(work)
        if self.storage.url not in _worker_syncs:
            _worker_syncs[self.storage.url] = self
            artifact.write_listeners.append(self.push_beside)

    def push_beside(self, path: Path) -> None:
        """Send a checkpoint in a thread while training goes on, and any other artifact or file at once, as `push` does.

        One is under way at a time, and what was written first is sent first. What went wrong with a checkpoint is
        raised here when the next thing is sent, or by `push_changes`.
        """
        if not self._belongs_there(path):
            return
        self._wait()
        if path.parent.name != "checkpoints":
            return self.push(path)
        thread = ThreadPoolExecutor(1, "upload")
        self._sending = thread.submit(self._push_unless_removed, path)
        thread.shutdown(wait=False)

    def _push_unless_removed(self, path: Path) -> None:
        """Send a checkpoint. One that training removes meanwhile, since its run is over, is not missed."""
        try:
            self.push(path)
        except (FileNotFoundError, StorageError):
            if path.exists():
                raise

    def _wait(self) -> None:
        sending, self._sending = self._sending, None
        if sending:
            sending.result()

    def push(self, path: Path) -> None:
        """Send one artifact or file of the run directory, and ignore a path outside it. Raises StorageError."""
        if not self._belongs_there(path):
            return
        key = self._key(path)
        with self._locked_state() as synced:
            if self.lease:
                self.lease.renew()
            if not path.is_dir():
                synced[key] = self._push_object(key, path)
                return
            synced[key] = self._push_folder(path, key)
            for log in (folder / "train.jsonl" for folder in path.parents if folder.is_relative_to(self.local)):
                if log.is_file():
                    synced[self._key(log)] = self._push_object(self._key(log), log)
            if path.parent.name == "checkpoints":
                self._prune(self._key(path.parent))

    def push_changes(self) -> None:
        """Send what changed without a listener's call, as the log does; remove what is gone here."""
        self._wait()
        for path in self._local_items():
            self.push(path)
        with self._locked_state():
            self._prune("")

    def pull(self, unfinished: bool = True) -> None:
        """Fetch what is not here, or was replaced on storage. Raises StorageError and CorruptArtifactError.

        `unfinished`: also the pieces of artifacts in the making, which the driver alone puts together.
        """
        with self._locked_state() as synced:
            keys = [key for key in self.storage.list_keys() if unfinished or ".partial/" not in key]
            for key in sorted(keys):
                if key.endswith(f"/{MANIFEST}"):
                    self._pull_folder(key.removesuffix(f"/{MANIFEST}"), synced)
                elif key.endswith(HASH):
                    self._pull_file(key.removesuffix(HASH), synced)
            self.known.update(key for key in keys if self._is_here(key))

    def delete(self, folder: str) -> None:
        """Remove a folder on storage that is not pi-ray's own, such as Ray Train's record of a run that is over."""
        with self.storage.explain_errors(ADVICE):
            for key in self.storage.list_keys(folder):
                self.storage.delete(key)

    @contextmanager
    def _locked_state(self) -> Iterator[dict[str, str]]:
        """Let a node's processes take turns. Yields key -> hash of all that is synced; changes are always kept."""
        self.local.mkdir(parents=True, exist_ok=True)
        with open(self.local / STATE, "a+") as state, self.storage.explain_errors(ADVICE):
            fcntl.flock(state, fcntl.LOCK_EX)
            state.seek(0)
            try:
                synced = json.loads(state.read() or "{}")
            except ValueError:  # a crash left half of it: then nothing here is known to have been sent
                synced = {}
            try:
                yield synced
            finally:
                state.seek(0)
                state.truncate()
                json.dump(synced, state)

    def _push_folder(self, folder: Path, key: str) -> str:
        manifest = (folder / MANIFEST).read_bytes()
        if self.storage.read(f"{key}/{MANIFEST}") == manifest:
            return digest(manifest)
        self.storage.delete(f"{key}/{MANIFEST}")
        paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        files = {f"{key}/{path.relative_to(folder).as_posix()}": path for path in paths}
        for stale in set(self.storage.list_keys(key)) - set(files):
            self.storage.delete(stale)
        self.known.update(files, [f"{key}/{MANIFEST}"])
        for name, path in files.items():
            self.storage.upload(path, name, atomic=False)
        self.storage.upload(folder / MANIFEST, f"{key}/{MANIFEST}")
        return digest(manifest)

    def _pull_folder(self, key: str, synced: dict[str, str]) -> None:
        folder, url = self.local / key, f"{self.storage.url}/{key}"
        here = digest((folder / MANIFEST).read_bytes()) if (folder / MANIFEST).is_file() else ""
        for attempt in range(1, ATTEMPTS + 1):
            manifest = self.storage.read(f"{key}/{MANIFEST}")
            if manifest is None or not self._is_to_fetch(key, here, digest(manifest), synced):
                return
            try:
                self.storage.fetch_folder(key, manifest, folder)
                synced[key] = digest(manifest)
                return
            except (CorruptArtifactError, FileNotFoundError) as error:
                if attempt == ATTEMPTS and self.storage.read(f"{key}/{MANIFEST}") == manifest:
                    cure = "remove it there, and the step that made it makes it again"
                    raise CorruptArtifactError(f"{url} is damaged ({error}); {cure}") from error

    def _push_object(self, key: str, content: Path | bytes) -> str:
        """Send a file, or bytes, unless they are there. Returns their hash."""
        found = digest(content) if isinstance(content, bytes) else digest_file(content)
        if self.storage.read(key + HASH) != found.encode():
            self.storage.delete(key + HASH)
            self.storage.upload(content, key)
            self.storage.upload(found.encode(), key + HASH)
        self.known.update((key, key + HASH))
        return found

    def _pull_file(self, key: str, synced: dict[str, str]) -> None:
        recorded, path = (self.storage.read(key + HASH) or b"").decode(), self.local / key
        here = digest_file(path) if path.is_file() else ""
        if not self._is_to_fetch(key, here, recorded, synced):
            return
        tmp = temporary_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.storage.fetch(key, tmp)
            if digest_file(tmp) != recorded:
                return  # it is being replaced: its hash comes last, and the next pull finds both
            os.replace(tmp, path)
            synced[key] = recorded
        except FileNotFoundError:
            return
        finally:
            tmp.unlink(missing_ok=True)

    def _is_to_fetch(self, key: str, here: str, stored: str, synced: dict[str, str]) -> bool:
        """Whether to fetch `key`, by its hash in this copy and on storage ("": it is not there).

        A hash that differs from the last synced one was written here since and not sent yet, so it is kept.
        """
        if stored and here == stored:
            synced[key] = here
        return stored not in ("", here) and (not here or synced.get(key) == here)

    def _prune(self, folder: str) -> None:
        """Remove on storage what is not here any more, such as old checkpoints: manifests and hashes first."""
        gone = [key for key in self.storage.list_keys(folder) if key in self.known and not self._is_here(key)]
        for key in sorted(gone, key=lambda key: not key.endswith((MANIFEST, HASH))):
            self.storage.delete(key)

    def _is_here(self, key: str) -> bool:
        return (self.local / key.removesuffix(HASH)).exists()

    def _belongs_there(self, path: Path) -> bool:
        """Whether storage has what is written at `path`: all of the run directory that is whole and not this node's."""
        if not path.is_relative_to(self.local):
            return False
        key = self._key(path)
        parts = PurePosixPath(key).parts
        return not (is_temporary(key) or LOCAL_ONLY & set(parts) or any(part.endswith(CORRUPT) for part in parts))

    def _key(self, path: Path) -> str:
        return path.relative_to(self.local).as_posix()

    def _local_items(self) -> Iterator[Path]:
        """Artifacts, and files that lie in none."""
        folders = [self.local]
        while folders:
            for path in sorted(folders.pop().iterdir()):
                if path.is_dir() and not path.is_symlink() and not (path / MANIFEST).is_file():
                    folders.append(path)
                elif not path.is_symlink():
                    yield path


_driver_syncs: list[StorageSync] = []
_worker_syncs: dict[str, StorageSync] = {}  # by URL
_started_work: set[str] = set()  # ids of the work for which this process has fetched


def sync_for(root: Path) -> StorageSync | None:
    """The driver's storage sync of the run directory `root`, or of a baseline in it; None where nodes share storage."""
    return next((sync for sync in _driver_syncs if root.is_relative_to(sync.local)), None)


def take_lease(lease: Path, holder: str) -> None:
    """In a worker: write `holder` into the file `lease`, and send nothing more once storage has another one there.

    Raises TrainingError where another group takes it at the same moment.
    """
    artifact.write_atomic(lease, holder)
    for sync in _worker_syncs.values():
        if lease.is_relative_to(sync.local):
            with sync.storage.explain_errors(ADVICE):
                sync.lease = StorageLease(sync.storage, lease.relative_to(sync.local).as_posix(), holder)


def fetch_updates(root: Path) -> None:
    """In a worker: fetch what other nodes have written since it started; nothing where nodes share storage."""
    for sync in _worker_syncs.values():
        if root.is_relative_to(sync.local):
            sync.pull(unfinished=False)
