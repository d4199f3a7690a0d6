"""Results that took long to compute, kept line by line, so that a command that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pi_ray.run.artifact import notify_written, translate_disk_errors, write_atomic

GROWTH = 1.1  # a file is sent again when it has grown by so much, so that all sendings are ten times its size at most


class ResultLog:
    """A file of JSON lines, {"key": ..., "value": ...}, read as a mapping. Within `with` results can be added.

    Memory has the keys alone. Of two results with one key the later one counts. Half a line, which a kill leaves, is
    passed over. After every `notify_every` results the file is sent to object storage, where it has grown, and in the
    end.
    """

    def __init__(self, path: Path, notify_every: int = 16):
        self.path, self._notify_every = path, notify_every
        self._places: dict[str, tuple[int, int]] = {}  # key -> first byte and length of its line
        self._file: BinaryIO | None = None
        self._added = self._sent_bytes = 0
        if path.exists():
            with open(path, "rb") as file:
                begin = 0
                for line in file:
                    with suppress(ValueError, KeyError, TypeError):
                        entry = json.loads(line)
                        entry["value"]
                        self._places[str(entry["key"])] = begin, len(line)
                    begin += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._line(key))["value"]

    def __enter__(self) -> ResultLog:
        with translate_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")
            self._file.write(b"\n" if self._file.tell() else b"")  # ends the half line that a kill left
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file
        with translate_disk_errors(self.path):
            self._file.close()
        notify_written(self.path)

    def add(self, key: str, value: Any) -> None:
        """Keep a result, a JSON value. Raises StorageError."""
        assert self._file, "only within `with`"
        line, begin = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode() + b"\n", self._file.tell()
        with translate_disk_errors(self.path):
            self._file.write(line)
            self._file.flush()
        self._places[key], self._added = (begin, len(line)), self._added + 1
        if self._added % self._notify_every == 0 and begin + len(line) >= GROWTH * self._sent_bytes:
            self._sent_bytes = begin + len(line)
            notify_written(self.path)

    def keep(self, keys: set[str]) -> None:
        """Leave only these in the file."""
        if not self._places.keys() <= keys:
            write_atomic(self.path, b"".join(self._line(key) for key in self if key in keys))
            self._places = ResultLog(self.path)._places

    def _line(self, key: str) -> bytes:
        begin, length = self._places[key]
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(length)
