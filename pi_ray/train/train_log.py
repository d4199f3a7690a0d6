"""Training log: train.jsonl, one line for each update and event, which people watch, reports draw and trackers get."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from pi_ray.cluster import storage_sync
from pi_ray.errors import MissingExtraError, TrainingError
from pi_ray.run.artifact import translate_disk_errors, write_atomic
from pi_ray.train.trackers import Tracker


class TrainLog:
    """Written by the first worker alone; on the others (`writes` is false) every call does nothing.

    The worker group that started last holds a lease, train.owner. A host whose link was cut trains on without knowing
    that another group has its work: it stops at its next line. What it wrote until then is what the new group writes
    too, since an update is a function of its number.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.tracker: Tracker | None = None
        self.lease, self.holder = path.with_name(storage_sync.LEASE), uuid.uuid4().hex
        if writes:
            storage_sync.take_lease(self.lease, self.holder)
        if writes and path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            write_atomic(path, data + b"\n")  # ends the half line that a crash left

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line. Raises StorageError on a full disk, TrainingError once another worker group has the lease."""
        if not self.writes:
            return
        with suppress(OSError):  # storage that cannot be read for a moment stops nobody
            if self.lease.read_text() != self.holder:
                raise TrainingError(
                    f"{self.lease}: another group of workers has taken this run over, as after a lost connection; "
                    "this one stops"
                )
        with translate_disk_errors(self.path), open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")
        if self.tracker:
            self._guarded(self.tracker.add, entry)

    def warn(self, text: str) -> None:
        self.add({"event": "warning", "text": text})

    def trim(self, done: int) -> None:
        """Drop lines of updates from `done` on, which will be done again, and half-written ones."""
        if self.writes and self.path.exists():
            kept = [entry for entry in read_entries(self.path.read_bytes()) if entry.get("step", -1) < done]
            write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def follow(self, open_tracker: Callable[[], Tracker | None]) -> None:
        """Send every entry from now on to a tracker as well."""
        if self.writes:
            self.tracker = self._guarded(open_tracker)

    def close(self) -> None:
        if self.tracker:
            self._guarded(self.tracker.close)

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call a tracker. One that fails, as when its server is gone, is dropped with a warning; training goes on."""
        try:
            return call(*args)
        except MissingExtraError:
            raise
        except Exception as error:
            self.tracker = None
            self.warn(f"train.tracker gets no more, training goes on: {type(error).__name__}: {error}")


class LogFollower:
    """Tells each entry of a growing log once, also where a resume trims the log and other lines take their place."""

    def __init__(self, path: Path):
        self.path = path
        self.told: list[bytes] = []  # lines of the file as it was at the last look, all of which were told
        self.offset = 0  # of the first byte after them

    def new_entries(self) -> Iterator[dict[str, Any]]:
        """Entries of the whole lines that came since the last call. After a trim these begin behind the lines kept."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as f:
            last = self.told[-1] if self.told else b""
            f.seek(self.offset - len(last))
            data = f.read()
            if data.startswith(last):
                data = data[len(last) :]
            else:
                f.seek(0)
                data = self._forget_trimmed(f.read())
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        self.told += lines
        self.offset += sum(map(len, lines))
        yield from read_entries(b"".join(lines))

    def _forget_trimmed(self, data: bytes) -> bytes:
        """The part of the file after those lines that it still has as they were told."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.told, data.splitlines(keepends=True), strict=False))
        self.told = [line for line, _ in same]
        self.offset = sum(map(len, self.told))
        return data[self.offset :]


def read_entries(data: bytes) -> Iterator[dict[str, Any]]:
    """Every whole line that is a JSON object."""
    for line in data.splitlines():
        with suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                yield entry
