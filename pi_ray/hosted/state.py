"""closed/state.json: what the service has been asked for, written after every step, so that a killed run pays for nothing twice."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.errors import CorruptArtifactError, TrainingError
from pi_ray.run.artifact import write_atomic


class State:
    """Phase fingerprint -> file, job, status, model, tokens, seconds. Phases of other settings stay: they were paid for."""

    def __init__(self, root: Path):
        self.path = root / "closed" / "state.json"
        try:
            self.phases: dict[str, dict[str, Any]] = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            self.phases = {}
        except ValueError as error:
            raise CorruptArtifactError(f"{self.path}: not readable as JSON ({error}); delete it to begin anew, which pays for every phase again") from error

    def of(self, fingerprint: str) -> dict[str, Any]:
        return self.phases.get(fingerprint, {})

    def put(self, fingerprint: str, **facts: Any) -> None:
        """Add to what is known of a phase and write it down; None takes a fact away."""
        known = {**self.of(fingerprint), **facts}
        self.phases[fingerprint] = {k: v for k, v in known.items() if v is not None}
        write_atomic(self.path, json.dumps(self.phases, indent=1) + "\n")


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Raises TrainingError while another process tunes the same run: both would create its jobs. The lock goes with the process."""
    folder = root / "closed"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{root}: another process is tuning this run; wait for it, or stop it") from None
        yield
