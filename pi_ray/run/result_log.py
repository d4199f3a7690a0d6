"""Results that took long to compute, kept line by line, so that a command that was killed goes on where it was."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pi_ray.run.artifact import notify_written, translate_disk_errors, write_atomic


class ResultLog:
    """A file of JSON lines, {"key": ..., "value": ...}. Within `with` results can be added.

    `results` has those that are there, by their key; of two with one key the later one. Half a line, which a kill
    leaves, is passed over. Every `notify_every` results the file is sent to object storage, and in the end.
    """

    def __init__(self, path: Path, notify_every: int = 16):
        self.path, self._notify_every = path, notify_every
        self.results: dict[str, Any] = {}
        self._file: TextIO | None = None
        self._added = 0
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self.results[str(entry["key"])] = entry["value"]

    def __enter__(self) -> ResultLog:
        with translate_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")
            self._file.write("\n" if self._file.tell() else "")  # ends the half line that a kill left
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
        with translate_disk_errors(self.path):
            self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
            self._file.flush()
        self.results[key] = value
        self._added += 1
        if self._added % self._notify_every == 0:
            notify_written(self.path)

    def keep(self, keys: set[str]) -> None:
        """Leave only these in the file."""
        self.results = {key: value for key, value in self.results.items() if key in keys}
        lines = (json.dumps({"key": k, "value": v}, ensure_ascii=False) + "\n" for k, v in self.results.items())
        write_atomic(self.path, "".join(lines))
