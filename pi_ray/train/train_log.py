"""Training log: train.jsonl, one line for each update and event, which people watch, reports draw and trackers get."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.errors import MissingExtraError
from pi_ray.run.artifact import translate_disk_errors, write_atomic
from pi_ray.train.lease import Lease

if TYPE_CHECKING:
    from pi_ray.train.trackers import Tracker


class TrainLog:
    """Written by the first worker alone; on the others (`writes` is false) every call does nothing."""

    def __init__(self, path: Path, writes: bool = True):
        self.path = path
        self.tracker: Tracker | None = None
        self.lease = Lease(path.with_suffix(".owner")) if writes else None
        if writes and path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            write_atomic(path, data + b"\n")  # ends the half line that a crash left

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line. Raises StorageError on a full disk, TrainingError once another worker group has the lease."""
        if not self.lease:
            return
        self.lease.check()
        with translate_disk_errors(self.path), open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")
        if self.tracker:
            self._guarded(self.tracker.add, entry)

    def trim(self, done: int) -> None:
        """Drop lines of updates from `done` on, which will be done again, and half-written ones."""
        if self.lease and self.path.exists():
            kept = [entry for entry in read_entries(self.path.read_bytes()) if entry.get("step", -1) < done]
            write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def follow(self, open_tracker: Callable[[], Tracker | None]) -> None:
        """Send every entry from now on to a tracker as well."""
        if self.lease:
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
            text = f"train.tracker gets no more, training goes on: {type(error).__name__}: {error}"
            self.add({"event": "warning", "text": text})


def read_entries(data: bytes) -> Iterator[dict[str, Any]]:
    """Every whole line that is a JSON object."""
    for line in data.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
