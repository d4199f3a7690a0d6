"""A score file of the user's: `score(row, output) -> {name: number from 0 to 1}`, whose first number decides.

`row` is a dict with id, query, answer, group and documents. On the user's own machine the file runs as it is; in a
submitted job it is somebody's program on a shared machine, and runs in the sandbox, with Python's standard library
alone (tasks/sandbox).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.config.metric import RESERVED
from pi_ray.errors import ConfigError, DataError
from pi_ray.protocols import Row
from pi_ray.tasks.sandbox.runner import Limits, Sandbox

PIECE = 50  # rows that one sandboxed process scores
LIMITS = Limits(seconds=60.0, output_kib=1024)  # of such a process


class ScoreFile:
    """Raises ConfigError for a file that is missing or no Python, DataError where `score` fails on a row."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        self.path, self.walled, self.unsafe = Path(config.file), config.sandbox, task.unsafe_local_execution
        self.is_checked = False
        try:
            self.source = self.path.read_text(encoding="utf-8-sig")
            compile(self.source, str(self.path), "exec")
        except OSError:
            cure = "write score(row, output) there"
            raise ConfigError(f"task.metric python: {self.path}: no such file; {cure}") from None
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"task.metric python: {self.path}: not Python: {error}") from None

    def check(self, row: Row) -> str:
        """Score the first row's own answer, so that a mistake in the file shows before anything is trained."""
        if not self.is_checked:
            self.score_all([row], [row.answer])
            self.is_checked = True
        return ""

    def score(self, row: Row, output: str) -> dict[str, float]:
        return self.score_all([row], [output])[0]

    def score_all(self, rows: Sequence[Row], outputs: Sequence[str]) -> list[dict[str, float]]:
        if not self.walled:
            found = [self._call(row, output) for row, output in zip(rows, outputs, strict=True)]
        else:
            starts = range(0, len(rows), PIECE)
            with ThreadPoolExecutor(self._sandbox.parallel) as pool:
                pieces = [pool.submit(self._score_inside, rows[i : i + PIECE], outputs[i : i + PIECE]) for i in starts]
            found = [score for piece in pieces for score in piece.result()]
        for row, score in zip(rows, found, strict=True):
            if not isinstance(score, Mapping) or not score or not all(map(_is_name, score)):
                raise DataError(f"{self.path}: score() of row '{row.id}' gave {score!r:.80}; it returns names with "
                    "numbers, such as {\"right\": 1.0}, and none of the names "
                    f"{', '.join(RESERVED)}, which reports have already")
        return found

    def _call(self, row: Row, output: str) -> Any:
        function = self._function
        try:
            return function(asdict(row), output)
        except (Exception, SystemExit) as error:
            raise DataError(f"{self.path}: score() raised {type(error).__name__} on row '{row.id}': {error}") from error

    @cached_property
    def _function(self) -> Callable[[dict[str, Any], str], Any]:
        """The file's `score`. The file runs once, as a module of its own name."""
        names: dict[str, Any] = {"__name__": "pi_ray_score", "__file__": str(self.path)}
        try:
            exec(compile(self.source, str(self.path), "exec"), names)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"task.metric python: {self.path} raised {type(error).__name__}: {error}") from error
        if not callable(names.get("score")):
            raise ConfigError(f"task.metric python: {self.path} has no function score(row, output)")
        return names["score"]

    @cached_property
    def _sandbox(self) -> Sandbox:
        sandbox = Sandbox(LIMITS, unsafe_local=self.unsafe)
        walls = [wall for wall in sandbox.protections if not wall.startswith("verdicts")]  # the file's numbers count
        print(f"{self.path.name} runs with these protections:", *walls, sep="\n  ", file=sys.stderr)
        return sandbox

    def _score_inside(self, rows: Sequence[Row], outputs: Sequence[str]) -> list[Any]:
        calls = [f"score({asdict(row)!r}, {output!r})" for row, output in zip(rows, outputs, strict=True)]
        values, reason = self._sandbox.values(self.source, calls)
        if reason:
            row = rows[min(len(values), len(rows) - 1)]
            raise DataError(f"{self.path}: score() {reason} on row '{row.id}' in the sandbox, which has Python's "
                "standard library alone, no network and no files of yours")
        return values


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and name not in RESERVED
