"""train.jsonl: one line for each update and each event, which people watch, the report draws, and trackers are sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.errors import MissingExtraError
from pi_ray.run.artifact import write_atomic, writing
from pi_ray.train.lease import Lease

if TYPE_CHECKING:
    from pi_ray.train.trackers import Tracker


class TrainLog:
    """Written by the first worker alone; the others' calls do nothing."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.tracker: Tracker | None = None
        self.lease = Lease(path.with_suffix(".owner")) if writes else None
        if writes and path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            write_atomic(path, data + b"\n")  # a crash left half a line, which the next one shall not join

    def add(self, entry: dict[str, Any]) -> None:
        """Raises StorageError where the disk does not take it, TrainingError once another group of workers has taken the run over."""
        if not self.lease:
            return
        self.lease.check()
        with writing(self.path), open(self.path, "a") as f:
            f.write(json.dumps(entry) + "\n")
        if self.tracker:
            self._watched(lambda: self.tracker.take(entry))

    def trim(self, done: int) -> None:
        """Drop what it says of updates that will be done again, and lines that a crash left half written."""
        if self.writes and self.path.exists():
            kept = [entry for entry in entries(self.path.read_bytes()) if entry.get("step", -1) < done]
            write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def follow(self, opens: Callable[[], Tracker | None]) -> None:
        """Send every entry from now on to a tracker as well."""
        if self.writes:
            self.tracker = self._watched(opens)

    def close(self) -> None:
        if self.tracker:
            self._watched(self.tracker.close)

    def _watched(self, call: Callable[[], Any]) -> Any:
        """A tracker that fails, such as a server that is gone, is given up with a warning: it must not stop what it watches."""
        try:
            return call()
        except MissingExtraError:
            raise
        except Exception as error:
            self.tracker = None
            self.add({"event": "warning", "text": f"train.tracker gets no more, training goes on: {type(error).__name__}: {error}"})


def entries(data: bytes) -> Iterator[dict[str, Any]]:
    """Every whole line that is a JSON object."""
    for line in data.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
