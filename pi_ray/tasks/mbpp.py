"""MBPP (Austin et al., 2021): a sentence and three asserts -> one Python function; template and query after the paper's Figure 5."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.prompt import Template
from pi_ray.protocols import Reject, Row
from pi_ray.run.artifact import digest
from pi_ray.tasks.dataset import fingerprint_files, select_rows
from pi_ray.tasks.metrics import exact_match
from pi_ray.tasks.sandbox.judge import split_tests
from pi_ray.tasks.sandbox.runner import Limits, Program, Sandbox

FILE = "mbpp.jsonl"
HUB = "google-research-datasets/mbpp"
IDS = {"test": range(11, 511), "dev": range(511, 601), "train": range(601, 975)}  # upstream's split; 1 to 10 are for few-shot prompts
SLOW = {123: 90.0}  # seconds; its reference solution takes 7 to more than 20, by the machine
FENCE = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.S | re.I)


@dataclass(frozen=True)
class MbppProblem:
    """One line of the release; `id` as upstream counts."""

    id: int
    text: str
    code: str
    tests: tuple[str, ...]
    setup: str

    @property
    def query(self) -> str:
        """The tests belong to it: the function's name and its arguments stand only there."""
        return "\n".join([f"NL Question: {self.text}", "Three Test Cases:", *self.tests])


class MbppTask:
    """The official `mbpp.jsonl` in `task.folder`, or without a folder the same from the hub.

    Scored by exact match, and with `task.allow_code_execution` by pass@1: the code runs in a sandbox and must pass the row's three tests.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.path = Path(config.folder) / FILE
        self._source = str(self.path) if config.folder else HUB

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Raises DataError when the file is missing or the hub cannot be had. Lines whose split cannot be told are rejected with "train"."""
        return select_rows(self._rows, self.config, split)

    def template(self) -> Template:
        return Template.parse(files("pi_ray.tasks").joinpath("mbpp.md").read_text(encoding="utf-8"))

    def score(self, row: Row, output: str) -> dict[str, float]:
        return self.score_all([row], [output])[0]

    def score_all(self, rows: Sequence[Row], outputs: Sequence[str]) -> list[dict[str, float]]:
        """Scores in the order of `rows`, as many programs at a time as there are cores. Raises ConfigError where they cannot be run safely."""
        codes = [extract_code(output) for output in outputs]
        scores = [{"exact_match": exact_match(code, row.answer)} for row, code in zip(rows, codes, strict=True)]
        if not self.config.allow_code_execution:
            return scores
        verdicts = self._sandbox.run_all([self.program(row, code) for row, code in zip(rows, codes, strict=True)])
        return [{**score, "pass_at_1": float(verdict.passed)} for score, verdict in zip(scores, verdicts, strict=True)]

    def program(self, row: Row, code: str) -> Program:
        """`code`, then the row's set-up (which may use what the code defines), then its tests. Raises DataError when the data lack the row."""
        problem = self._problems.get(row.id)
        if problem is None:
            raise DataError(f"row '{row.id}' is not in {self._source}, so its tests are unknown; prepare the run again from the present data")
        return Program(code, problem.tests, problem.setup, Limits(seconds=SLOW[problem.id]) if problem.id in SLOW else None)

    def fingerprint(self) -> str:
        return digest([self.template().text, fingerprint_files(self.config, [self.path] if self.config.folder else ())])

    @cached_property
    def _sandbox(self) -> Sandbox:
        """Made when the first program is to be run, and says then what holds it."""
        sandbox = Sandbox(unsafe_local=self.config.unsafe_local_execution)
        print("generated code runs with these protections:", *sandbox.protections(), sep="\n  ", file=sys.stderr)
        return sandbox

    @cached_property
    def _problems(self) -> dict[str, MbppProblem]:
        return {str(found.id): found for found in self._found if isinstance(found, MbppProblem)}

    def _rows(self, split: str) -> Iterator[Row | Reject]:
        for found in self._found:
            if isinstance(found, MbppProblem) and found.id in IDS.get(split, ()):
                yield Row(str(found.id), found.query, found.code)
            elif isinstance(found, Reject) and split == "train":
                yield found

    @cached_property
    def _found(self) -> list[MbppProblem | Reject]:
        """All lines, read once: there are 974."""
        found: dict[int, MbppProblem | Reject] = {}  # a Reject under minus its line number
        for number, line in enumerate(self._lines(), start=1):
            try:
                problem = _problem(line)
                if problem.id in found:
                    raise ValueError(f"duplicate task_id {problem.id}")
                found[problem.id] = problem
            except ValueError as error:
                found[-number] = Reject(self._source, number, str(error))
        return list(found.values())

    def _lines(self) -> Iterator[bytes | dict[str, Any]]:
        if not self.config.folder:
            yield from load_mbpp_from_hub()
            return
        if not self.path.is_file():
            raise DataError(
                f"task.folder '{self.config.folder}' lacks {FILE}: it must hold the file of this name with 974 lines that Google Research "
                "publishes on GitHub (google-research/google-research, folder mbpp)"
            )
        with open(self.path, "rb") as lines:
            yield from lines


def extract_code(output: str) -> str:
    """What stands in the first code fence of `output`, or all of it when it has none."""
    fenced = FENCE.search(output)
    return fenced[1] if fenced else output


def load_mbpp_from_hub() -> Iterable[dict[str, Any]]:
    """All splits as the hub has them. Raises DataError when the package `datasets` is missing or the hub does not answer."""
    try:
        from datasets import load_dataset

        return [row for split in load_dataset(HUB, "full").values() for row in split]
    except Exception as error:  # ImportError, no network, refused, gone: datasets raises many unrelated types for these
        raise DataError(
            f"task.folder is empty, and {HUB} cannot be had from the hub ({type(error).__name__}: {error}): "
            f"set task.folder to a folder with {FILE}, or pip install datasets and connect"
        ) from None


def _problem(line: bytes | dict[str, Any]) -> MbppProblem:
    """Raises ValueError with the reason when the line cannot be used."""
    data = json.loads(line.decode("utf-8")) if isinstance(line, bytes) else line
    if not isinstance(data, dict) or not isinstance(data.get("task_id"), int) or data["task_id"] < 1:
        raise ValueError("not an object with a task_id, a number from 1")
    texts = [data.get("text"), data.get("code"), data.get("test_setup_code") or "", *(data.get("test_list") or [None])]
    if not all(isinstance(text, str) for text in texts) or not all(text.strip() for text in texts[:2]):
        raise ValueError(f"task {data['task_id']}: text, code and test_list are needed, and all must be text")
    text, code, setup, *tests = map(_clean, texts)
    try:
        split_tests(tests)
    except DataError as error:
        raise ValueError(f"task {data['task_id']}: {error}") from None
    return MbppProblem(data["task_id"], text, code, tuple(tests), setup)


def _clean(text: str) -> str:
    """Upstream's line ends are CRLF. Tabs and spaces at the end of a line stay, since they can stand within a string."""
    return text.replace("\r\n", "\n").strip("\r\n").rstrip()
