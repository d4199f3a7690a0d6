"""A run directory on object storage (s3://, gs://, any file system of pyarrow's), for nodes that share no disk: each works in a folder of its own.

What is written into the folder is sent under the same name, and what is there is fetched before work starts; what was written here and could not
be sent is kept. A reader never has half of anything:
    an artefact (a folder with a manifest)    its old manifest is removed, its files are sent, the new manifest comes last; what is fetched is verified
    a single file                             sent under another name and moved; its hash comes last, beside it (NAME.sha256)
    the link adapters/best                    a single file that holds the name
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pi_ray.errors import CorruptArtifactError, StorageError
from pi_ray.run import artifact
from pi_ray.run.artifact import MANIFEST, digest, digest_file, verify
from pi_ray.run.object_storage import Objects, is_passing

HASH, LINK = ".sha256", ".link"
TRIES = 3  # an artefact may be replaced while it is fetched
STATE = ".mirror.json"  # key -> hash of what is the same here and there; its lock is the node's
SCRATCH = {"ray", STATE}  # of this node alone, or of Ray

_attached: list[Mirror] = []
_joined: dict[str, Mirror] = {}  # by URL, of this process
_begun: set[str] = set()  # work that this process has joined for


def of(root: Path) -> Mirror | None:
    """For the workers of a step: the mirror that this process has attached and that `root` lies in, as a baseline's does; None where nodes share storage."""
    return next((mirror for mirror in _attached if root.is_relative_to(mirror.local)), None)


def refresh(root: Path) -> None:
    """Inside a worker: fetch what other nodes have written since it joined; nothing where nodes share storage."""
    for mirror in _joined.values():
        if root.is_relative_to(mirror.local):
            mirror.pull(unfinished=False)


def is_url(place: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", place) is not None


class Mirror:
    """The run directory `local` and its copy `there`."""

    def __init__(self, local: Path, there: Objects):
        self.local, self.there = local, there
        self.known: set[str] = set()  # keys that were seen here: only these are removed there when they are gone here

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Fetch what is there, send what is written meanwhile by this process, and the rest when all went well."""
        self.pull()
        artifact.written.append(self.push)
        _attached.append(self)
        try:
            yield
        finally:
            _attached.remove(self)
            artifact.written.remove(self.push)
        self.save()

    def push(self, path: Path) -> None:
        """Send one artefact or file of the run directory; of others nothing. Raises StorageError."""
        if not path.is_relative_to(self.local):
            return
        key = path.relative_to(self.local).as_posix()
        if is_passing(key) or SCRATCH & set(PurePosixPath(key).parts):
            return
        with self._turn() as same:
            if path.is_dir():
                same[key] = self._push_folder(path, key)
                for log in (folder / "train.jsonl" for folder in path.parents if folder.is_relative_to(self.local)):
                    if log.is_file():
                        same[log.relative_to(self.local).as_posix()] = self._push_file(log, log.relative_to(self.local).as_posix())
                if path.parent.name == "checkpoints":
                    self._prune(path.parent.relative_to(self.local).as_posix())
            else:
                same[key] = self._push_file(path, key)

    def save(self) -> None:
        """Send what changed without having been sent, such as the log, and the link to the best adapter. Remove what is not here any more."""
        for path in self._here():
            self.push(path)
        with self._turn():
            for link in self.local.rglob("adapters/best"):
                if link.is_symlink():
                    self._push_bytes(os.readlink(link).encode(), link.relative_to(self.local).as_posix() + LINK)
            self._prune("")

    def pull(self, unfinished: bool = True) -> None:
        """Fetch what is there and not here, or is other here because it was replaced there. Raises StorageError and CorruptArtifactError.

        `unfinished`: also the pieces of what is being made, which the driver alone puts together.
        """
        with self._turn() as same:
            keys = [key for key in self.there.list() if unfinished or ".partial/" not in key]
            for key in sorted(keys):
                if key.endswith(f"/{MANIFEST}"):
                    self._pull_folder(key.removesuffix(f"/{MANIFEST}"), same)
                elif key.endswith(HASH):
                    self._pull_file(key.removesuffix(HASH), same)
            self.known.update(key for key in keys if self._is_here(key))

    def drop(self, inside: str) -> None:
        """Remove what others than pi-ray keep under this name there, such as Ray Train's record of a run that is over."""
        with self._reached():
            for key in self.there.list(inside):
                self.there.forget(key)

    def join(self, work: str = "") -> None:
        """Fetch what is there, once for each `work` that has a name, and from now on send what this process writes: for workers, which end with their work."""
        if work in _begun:
            return
        self.pull(unfinished=False)
        if work:
            _begun.add(work)
        if self.there.url not in _joined:
            _joined[self.there.url] = self
            artifact.written.append(self.push)

    @contextmanager
    def _turn(self) -> Iterator[dict[str, str]]:
        """Processes of one node take turns. Yields what is the same here and there, which is kept, also after an error."""
        self.local.mkdir(parents=True, exist_ok=True)
        with open(self.local / STATE, "a+") as state, self._reached():
            fcntl.flock(state, fcntl.LOCK_EX)
            state.seek(0)
            try:
                same = json.loads(state.read() or "{}")
            except ValueError:  # a crash left half of it: then nothing here is known to have been sent
                same = {}
            try:
                yield same
            finally:
                state.seek(0)
                state.truncate()
                json.dump(same, state)

    # Artefacts

    def _push_folder(self, folder: Path, key: str) -> str:
        manifest = (folder / MANIFEST).read_bytes()
        if self.there.read(f"{key}/{MANIFEST}") == manifest:
            return digest(manifest)
        self.there.forget(f"{key}/{MANIFEST}")
        names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST}
        for left in self.there.list(key):
            if left.removeprefix(f"{key}/") not in names:
                self.there.forget(left)
        for name, path in names.items():
            self.there.send(path, f"{key}/{name}")
        self.there.put(folder / MANIFEST, f"{key}/{MANIFEST}")
        self.known.update(f"{key}/{name}" for name in (MANIFEST, *names))
        return digest(manifest)

    def _pull_folder(self, key: str, same: dict[str, str]) -> None:
        folder = self.local / key
        here = digest((folder / MANIFEST).read_bytes()) if (folder / MANIFEST).is_file() else None
        for attempt in range(1, TRIES + 1):
            manifest = self.there.read(f"{key}/{MANIFEST}")
            if manifest is None or here == digest(manifest):
                same.update({key: here} if manifest else {})
                return
            if here and same.get(key) != here:
                return  # written here since, and not sent yet
            tmp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
            try:
                tmp.mkdir(parents=True)
                (tmp / MANIFEST).write_bytes(manifest)
                for name in artifact.read_manifest(tmp)["files"]:
                    if not (tmp / name).resolve().is_relative_to(tmp.resolve()):
                        raise CorruptArtifactError(f"{self.there.url}/{key}: its manifest names a file outside it")
                    (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                    self.there.fetch(f"{key}/{name}", tmp / name)
                verify(tmp)
                artifact.commit(tmp, folder, tell=False)
                same[key] = digest(manifest)
                return
            except (CorruptArtifactError, FileNotFoundError) as error:
                if attempt == TRIES and self.there.read(f"{key}/{MANIFEST}") == manifest:
                    raise CorruptArtifactError(f"{self.there.url}/{key} is damaged ({str(error).removeprefix(f'{tmp}/')}); remove it there, and the step that made it makes it again") from error
            finally:
                shutil.rmtree(tmp, ignore_errors=True)

    # Single files

    def _push_file(self, path: Path, key: str) -> str:
        found = digest_file(path)
        if self.there.read(key + HASH) != found.encode():
            self.there.forget(key + HASH)
            self.there.put(path, key)
            self.there.write(found.encode(), key + HASH)
        self.known.update((key, key + HASH))
        return found

    def _push_bytes(self, data: bytes, key: str) -> None:
        if self.there.read(key) != data or self.there.read(key + HASH) != digest(data).encode():
            self.there.forget(key + HASH)
            self.there.write(data, key)
            self.there.write(digest(data).encode(), key + HASH)

    def _pull_file(self, key: str, same: dict[str, str]) -> None:
        recorded, link = self.there.read(key + HASH), key.endswith(LINK)
        path = self.local / key.removesuffix(LINK)
        here = digest_file(path) if path.is_file() and not link else None
        if recorded is None or here == recorded.decode():
            same.update({key: here} if recorded else {})
            return
        if here and same.get(key) != here:
            return  # written here since, and not sent yet
        tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.there.fetch(key, tmp)
            if digest_file(tmp) != recorded.decode():
                return  # being replaced at this moment; its hash comes last, and with it the next look
            if link:
                name = tmp.read_text()
                tmp.unlink()
                tmp.symlink_to(PurePosixPath(name).name)
            os.replace(tmp, path)
            same[key] = recorded.decode()
        except FileNotFoundError:
            return
        finally:
            tmp.unlink(missing_ok=True)

    # What is there

    def _prune(self, inside: str) -> None:
        """Remove from the copy what is not here any more, such as old checkpoints: manifests and hashes first."""
        gone = [key for key in self.there.list(inside) if key in self.known and not self._is_here(key)]
        for key in sorted(gone, key=lambda key: not key.endswith((MANIFEST, HASH))):
            self.there.forget(key)

    def _is_here(self, key: str) -> bool:
        path = self.local / key.removesuffix(HASH).removesuffix(LINK)
        return path.exists() or path.is_symlink()

    def _here(self) -> Iterator[Path]:
        """Artefacts, and files in none."""
        folders = [self.local]
        while folders:
            for path in sorted(folders.pop().iterdir()):
                if path.is_dir() and not path.is_symlink() and not (path / MANIFEST).is_file():
                    folders.append(path)
                elif not path.is_symlink():
                    yield path

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (CorruptArtifactError, StorageError):
            raise
        except OSError as error:
            raise StorageError(f"{self.there.url}: storage does not answer, or refuses ({error}); what was sent before is whole, and the same command goes on from it") from error

