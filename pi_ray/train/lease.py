"""Who may write into a run directory: the worker group that started last.

A host whose link was cut trains on without knowing that it was given up and that another group has its work. Once that group has taken the
lease, the old one stops at its next line of the log; what it wrote until then is what the new one writes too, since an update is a function of its number.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pi_ray.errors import TrainingError
from pi_ray.run.artifact import write_atomic


class Lease:
    """Taken when it is made, from whoever had it."""

    def __init__(self, path: Path):
        self.path, self.mark = path, uuid.uuid4().hex
        write_atomic(path, self.mark)

    def check(self) -> None:
        """Raises TrainingError once another group has it. A file that cannot be read says nothing."""
        try:
            mark = self.path.read_text()
        except OSError:
            return
        if mark != self.mark:
            raise TrainingError(f"{self.path}: another group of workers has taken this run over, as after a lost connection; this one stops")
