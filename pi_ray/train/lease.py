"""Lease of a run directory: only the worker group that started last may write into it.

A host whose link was cut trains on without knowing that another group has its work. Once that group has taken the
lease, the old one stops at its next log line; what it wrote until then is what the new one writes too, since an update
is a function of its number.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pi_ray.errors import TrainingError
from pi_ray.run.artifact import write_atomic


class Lease:
    """Taken when it is made, from whoever had it."""

    def __init__(self, path: Path):
        self.path, self.holder = path, uuid.uuid4().hex
        write_atomic(path, self.holder)

    def check(self) -> None:
        """Raises TrainingError once another group has the lease. A file that cannot be read is ignored."""
        try:
            holder = self.path.read_text()
        except OSError:
            return
        if holder != self.holder:
            raise TrainingError(
                f"{self.path}: another group of workers has taken this run over, as after a lost connection; "
                "this one stops"
            )
