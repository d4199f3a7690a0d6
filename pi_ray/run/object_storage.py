"""Objects under a URL (s3://, gs://, file://, any file system of pyarrow's), by their keys: written whole or not at all."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pi_ray.errors import StorageError

PIECE = 1 << 20
PASSING = re.compile(r"\..+\.[0-9a-f]{32}\.(tmp|old)")  # names of what is still being written, here and in artifact.py


def is_passing(key: str) -> bool:
    return any(PASSING.fullmatch(part) for part in PurePosixPath(key).parts)


class Objects:
    """`files` and `root` instead of the URL's, for tests. Raises what the file system raises: OSError of some kind."""

    def __init__(self, url: str, files: Any = None, root: str = ""):
        self.url = url
        if files is None:
            files, root = _file_system(url)
        self.files, self.root = files, root.rstrip("/")

    def list(self, inside: str = "") -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        found = self.files.get_file_info(FileSelector(self._at(inside), allow_not_found=True, recursive=True))
        keys = [info.path.removeprefix(self.root).lstrip("/") for info in found if info.type == FileType.File]
        return [key for key in keys if not is_passing(key)]

    def folders(self, pattern: str) -> list[str]:
        """Names of the folders right here that a pattern such as "run-*" fits."""
        from pyarrow.fs import FileSelector, FileType

        found = self.files.get_file_info(FileSelector(self._at(""), allow_not_found=True))
        return [info.base_name for info in found if info.type == FileType.Directory and fnmatchcase(info.base_name, pattern)]

    def read(self, key: str) -> bytes | None:
        try:
            with self.files.open_input_stream(self._at(key)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def fetch(self, key: str, to: Path) -> None:
        with self.files.open_input_stream(self._at(key)) as stream, open(to, "wb") as out:
            shutil.copyfileobj(stream, out, PIECE)

    def forget(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self.files.delete_file(self._at(key))

    def send(self, path: Path, key: str) -> None:
        """Straight to its name, where a part of it stays if the connection is lost: for a file that no manifest names yet."""
        self.files.create_dir(self._at(str(PurePosixPath(key).parent)), recursive=True)
        with open(path, "rb") as source, self.files.open_output_stream(self._at(key)) as out:
            shutil.copyfileobj(source, out, PIECE)

    def put(self, path: Path, key: str) -> None:
        """A file, whole or not at all: sent under another name, then moved."""
        self._whole(key, lambda tmp: self.send(path, tmp))

    def write(self, data: bytes, key: str) -> None:
        """As `put`, from memory."""

        def write(tmp: str) -> None:
            with self.files.open_output_stream(self._at(tmp)) as out:
                out.write(data)

        self._whole(key, write)

    def _whole(self, key: str, write: Callable[[str], None]) -> None:
        place = PurePosixPath(key)
        tmp = str(place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp"))
        self.files.create_dir(self._at(str(place.parent)), recursive=True)
        try:
            write(tmp)
            self.files.move(self._at(tmp), self._at(key))
        except BaseException:
            with suppress(OSError):
                self.files.delete_file(self._at(tmp))
            raise

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}".rstrip("/")


def _file_system(url: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(url)
    except (ValueError, ImportError, OSError) as error:
        raise StorageError(f"cluster.storage_path: {url} cannot be opened ({str(error).splitlines()[0]}); take a folder, s3://bucket/folder or gs://bucket/folder") from error
