"""closed/state.json: files and jobs at the service, written after every step, so that nothing is paid for twice."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.errors import CorruptArtifactError, TrainingError
from pi_ray.run.artifact import write_atomic


class TuningState:
    """Phase fingerprint -> file, job, status, model, tokens, seconds. Phases of other settings stay: they are paid for.

    Raises CorruptArtifactError when the file cannot be read.
    """

    def __init__(self, root: Path):
        self.path = root / "closed" / "state.json"
        try:
            self.phases: dict[str, dict[str, Any]] = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            self.phases = {}
        except ValueError as error:
            raise CorruptArtifactError(
                f"{self.path}: not readable as JSON ({error}); "
                "delete it to begin anew, which pays for every phase again"
            ) from error

    def get(self, fingerprint: str) -> dict[str, Any]:
        return self.phases.get(fingerprint, {})

    def put(self, fingerprint: str, **facts: Any) -> None:
        """Add facts of a phase and write them down; None takes a fact away."""
        known = {**self.get(fingerprint), **facts}
        self.phases[fingerprint] = {k: v for k, v in known.items() if v is not None}
        write_atomic(self.path, json.dumps(self.phases, indent=1) + "\n")


@contextmanager
def tuning_lock(root: Path) -> Iterator[None]:
    """Keep other processes from tuning the same run, which would create its jobs twice. The lock ends with the process.

    Raises TrainingError when another process has it.
    """
    folder = root / "closed"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{root}: another process is tuning this run; wait for it, or stop it") from None
        yield
