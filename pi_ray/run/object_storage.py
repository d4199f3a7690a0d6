"""Objects under a URL, by keys: s3://, gs://, hf://, file://, with credentials where providers' own tools have them."""

import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pi_ray.config import check_storage_url
from pi_ray.errors import CorruptArtifactError, StorageError
from pi_ray.run import artifact

CHUNK = 1 << 20  # bytes copied at once


def is_url(place: Path | str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


def is_temporary(key: str) -> bool:
    """Whether `key` is, or lies in, something that is still being written."""
    return any(artifact.TEMPORARY.fullmatch(part) for part in PurePosixPath(key).parts)


class ObjectStorage:
    """The objects under `url`, or `root` of a `file_system`. Methods raise OSErrors for `explain_errors` to explain."""

    def __init__(self, url: str, file_system: Any = None, root: str = ""):
        self.url = url
        if file_system is None:
            file_system, root = open_file_system(url)
        self._opened, self._root = file_system, root.rstrip("/")

    @contextmanager
    def explain_errors(self, advice: str) -> Iterator[None]:
        """Turn an OSError of any method into a StorageError that ends in `advice`."""
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.url}: storage does not answer, or refuses ({error}); {advice}") from error

    def list_keys(self, inside: str = "") -> list[str]:
        """The keys of all whole objects under the folder `inside`. Raises CorruptArtifactError for one that is no path.
        """
        found = self._list(inside, recursive=True)
        keys = [info.path.removeprefix(f"{self._root}/") for info in found if info.is_file]
        if odd := [key for key in keys if {"", ".", ".."} & set(key.split("/"))]:
            cure = "which pi-ray never writes; remove it there, and ask who may write to this place"
            raise CorruptArtifactError(f"{self.url}: the key {odd[0][:80]!r} leads out of its folder, {cure}")
        return [key for key in keys if not is_temporary(key)]

    def list_folders(self, inside: str = "", pattern: str = "*", holding: str = "") -> list[str]:
        """Names of the folders directly in `inside` that fit `pattern` and hold an object of the name `holding`."""
        if self.provider == "gcs":  # pyarrow sees a folder there only where an object of its name stands for it
            below = (info.path.removeprefix(f"{self._path(inside)}/") for info in self._list(inside, recursive=True))
            found = sorted({path.split("/")[0] for path in below if "/" in path})
        else:
            found = [info.base_name for info in self._list(inside) if not info.is_file]
        names = [name for name in found if fnmatchcase(name, pattern)]
        if not holding or not names:
            return names
        infos = self._files.get_file_info([f"{self._path(inside)}/{name}/{holding}" for name in names])
        return [name for name, info in zip(names, infos, strict=True) if info.is_file]

    def read(self, key: str, max_bytes: int | None = None) -> bytes | None:
        """An object, or its first `max_bytes`; None when there is none."""
        try:
            with self._files.open_input_stream(self._path(key)) as stream:
                return stream.read(max_bytes)
        except FileNotFoundError:
            return None

    def fetch(self, key: str, path: Path, max_bytes: int = sys.maxsize) -> bool:
        """Copy an object into a file, no more than `max_bytes` of it. Returns whether that was all of it."""
        with self._files.open_input_stream(self._path(key)) as stream, open(path, "wb") as out:
            while max_bytes and (data := stream.read(min(CHUNK, max_bytes))):
                max_bytes -= out.write(data)
            return not stream.read(1)

    def fetch_all(self, path: Path) -> None:
        """Copy the object that the URL names, or all whole ones below it, to `path`; nothing where there is none."""
        if self._files.get_file_info(self._root).is_file:
            self.fetch("", path)
            return
        for key in self.list_keys():
            (path / key).parent.mkdir(parents=True, exist_ok=True)
            self.fetch(key, path / key)

    def fetch_folder(self, key: str, manifest: bytes, folder: Path) -> None:
        """Copy an artifact beside `folder`, verify it, then give it that name. FileNotFoundError: a part is missing."""
        tmp = artifact.temporary_path(folder)
        with artifact.translate_disk_errors(folder):
            tmp.mkdir(parents=True)
            try:
                (tmp / artifact.MANIFEST).write_bytes(manifest)
                for name, recorded in (artifact.read_manifest(tmp) or {})["files"].items():
                    if artifact.leads_out(name):
                        raise CorruptArtifactError("its manifest names a file outside it")
                    (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                    if not self.fetch(f"{key}/{name}", tmp / name, recorded["bytes"]):
                        raise CorruptArtifactError(f"{name}: larger than the {recorded['bytes']} bytes of its manifest")
                artifact.verify_artifact(tmp)
                try:
                    os.rename(tmp, folder)
                except OSError:  # another one is there: the same, which a second process has fetched, or an older one
                    if not _holds(folder, manifest):
                        artifact.commit_folder(tmp, folder, notify=False)
            except CorruptArtifactError as error:
                raise CorruptArtifactError(str(error).removeprefix(f"{tmp}/")) from error
            finally:
                shutil.rmtree(tmp, ignore_errors=True)

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._files.delete_file(self._path(key))

    def remove_leftovers(self, inside: str) -> None:
        """Remove what killed writers have left under the folder `inside`: objects that nobody reads by their names."""
        for info in self._list(inside, recursive=True):
            if info.is_file and is_temporary(info.path.removeprefix(f"{self._root}/")):
                with suppress(FileNotFoundError):
                    self._files.delete_file(info.path)

    def upload(self, content: Path | bytes, key: str, atomic: bool = True) -> None:
        """Copy a file, or bytes, to `key`, whole or not at all: it is sent under another name, then moved.

        With `atomic=False` a part may stay there: for what no manifest names yet, or the provider replaces as a whole.
        A disk (file://) never does.
        """
        atomic = atomic or self.provider == "local"
        final = PurePosixPath(self._path(key))
        target = artifact.temporary_path(final) if atomic else final
        if self.provider != "gcs":  # its objects need no folder, and a bucket that is not there would be made
            self._files.create_dir(str(final.parent), recursive=True)
        source = io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")  # noqa: SIM115 (closed below)
        try:
            with source, self._files.open_output_stream(str(target)) as out:
                shutil.copyfileobj(source, out, CHUNK)
            if atomic:
                self._files.move(str(target), str(final))
        except BaseException:
            if atomic:
                with suppress(OSError):
                    self._files.delete_file(str(target))
            raise

    @property
    def provider(self) -> str:
        """pyarrow's name for the kind of storage: "s3", "gcs", "local", "py::fsspec+hf"."""
        return getattr(self._opened, "type_name", "")

    @property
    def region(self) -> str:
        """The region of a bucket on S3, which pyarrow finds where the URL does not name it; "" for others."""
        return getattr(self._opened, "region", "")

    @property
    def _files(self) -> Any:
        """The file system, which asks the provider anew: one of fsspec's remembers listings for ever."""
        if handler := getattr(self._opened, "handler", None):
            handler.fs.invalidate_cache()
        return self._opened

    def _list(self, inside: str, recursive: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        return self._files.get_file_info(FileSelector(self._path(inside), allow_not_found=True, recursive=recursive))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")


def _holds(folder: Path, manifest: bytes) -> bool:
    """Whether `folder` is whole and has exactly this manifest."""
    try:
        artifact.verify_artifact(folder)
        return (folder / artifact.MANIFEST).read_bytes() == manifest
    except (CorruptArtifactError, OSError):
        return False


def open_file_system(url: str) -> tuple[Any, str]:
    """pyarrow's file system and the path in it. Raises StorageError for a URL that it does not know, or with a secret.
    """
    from pyarrow.fs import FileSystem

    try:
        check_storage_url(url, "the URL of storage")
    except ValueError as error:
        raise StorageError(str(error)) from None
    public = url.partition("?")[0]  # what follows may hold a secret
    try:
        file_system, path = FileSystem.from_uri(url)
    except (ValueError, ImportError, OSError) as error:
        reason = f"cannot be opened ({str(error).splitlines()[0]})"
        raise StorageError(f"{public} {reason}; take a folder, s3://bucket/folder, gs://, hf:// or file://") from error
    if not path.strip("/"):
        raise StorageError(f"{public} names no place; give bucket and path: s3://bucket/folder, gs://, hf://, file://")
    return file_system, path
