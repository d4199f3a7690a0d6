"""MBPP (Austin et al., 2021): a sentence and three asserts -> a Python function; prompt after the paper's Figure 5."""

import json
import re
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from pi_ray.errors import DataError
from pi_ray.metrics import exact_match
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.dataset import DatasetTask
from pi_ray.tasks.sandbox.judge import split_tests
from pi_ray.tasks.sandbox.runner import Limits, Program, Sandbox

FILE = "mbpp.jsonl"
HUB = "google-research-datasets/mbpp"
# upstream's split by task_id; 1 to 10 are for few-shot prompts
Ids = dict[str, Container[int]]  # split -> task_ids
UPSTREAM: Ids = {"test": range(11, 511), "dev": range(511, 601), "train": range(601, 975)}
# The PromptIntern paper (A.1) has 974 training and 102 test rows of the 974 that there are. Here the test rows are as
# many, a few are for choosing, and all others train.
PAPER: Ids = {
    "test": range(11, 113), "dev": range(571, 601), "train": {*range(1, 11), *range(113, 571), *range(601, 975)},
}
SLOW = {123: 90.0}  # seconds; its reference solution takes 7 to more than 20, by the machine
FENCE = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.S | re.I)


class MbppTask(DatasetTask):
    """The official `mbpp.jsonl` in `task.folder`, or without a folder the same from the hub.

    Scored by exact match, and with `task.allow_code_execution` by pass@1: a sandbox runs the row's three tests.
    """

    template_file = "mbpp.md"
    data_files = (FILE,)
    must_hold = "its 974 lines, as published on GitHub (google-research/google-research, folder mbpp)"

    def score(self, row: Row, output: str) -> dict[str, float]:
        return self.score_all([row], [output])[0]

    def score_all(self, rows: Sequence[Row], outputs: Sequence[str]) -> list[dict[str, float]]:
        """Scores in the order of `rows`, with all cores. Raises ConfigError where programs cannot be run safely."""
        codes = [extract_code(output) for output in outputs]
        scores = [{"exact_match": exact_match(code, row.answer)} for row, code in zip(rows, codes, strict=True)]
        if self.config.allow_code_execution:
            programs = [self.program(row, code) for row, code in zip(rows, codes, strict=True)]
            for score, verdict in zip(scores, self._sandbox.run_all(programs), strict=True):
                score["pass_at_1"] = float(verdict.passed)
        return scores

    def program(self, row: Row, code: str) -> Program:
        """`code`, the row's set-up (which may use `code`), its tests. Raises DataError for an unknown row."""
        found = self._problems.get(row.id)
        if found is None or isinstance(found, Reject):
            reason = f"row '{row.id}' is not in {self._source}, so its tests are unknown"
            raise DataError(f"{reason}; prepare the run again from the present data")
        return replace(found[1], code=code)

    @cached_property
    def _sandbox(self) -> Sandbox:
        sandbox = Sandbox(unsafe_local=self.config.unsafe_local_execution)
        print("generated code runs with these protections:", *sandbox.protections, sep="\n  ", file=sys.stderr)
        return sandbox

    def read_split(self, split: str) -> Iterator[Row | Reject]:
        ids = PAPER if self.config.split == "paper" else UPSTREAM
        for found in self._problems.values():
            if isinstance(found, Reject):
                if split == "train":
                    yield found
            elif int(found[0].id) in ids.get(split, ()):
                yield found[0]

    @cached_property
    def _problems(self) -> dict[str, tuple[Row, Program] | Reject]:
        """All lines, read once, since there are 974: rows and their reference programs by id, rejects by line."""
        found: dict[str, tuple[Row, Program] | Reject] = {}
        for number, line in enumerate(self._read_lines(), start=1):
            try:
                row, program = _parse_problem(line)
                if row.id in found:
                    raise ValueError(f"duplicate task_id {row.id}")
                found[row.id] = row, program
            except ValueError as error:
                found[f"line {number}"] = Reject(self._source, number, str(error))
        return found

    @property
    def _source(self) -> str:
        return str(self.folder / FILE) if self.config.folder else HUB

    def _read_lines(self) -> Iterator[bytes | dict[str, Any]]:
        if not self.config.folder:
            for rows in self.load_from_hub(HUB, "full").values():
                yield from rows
            return
        self.require_files()
        with open(self.folder / FILE, "rb") as lines:
            yield from lines


def extract_code(output: str) -> str:
    """The content of the first code fence of `output`, or all of `output` where it has none."""
    fenced = FENCE.search(output)
    return fenced[1] if fenced else output


def _parse_problem(line: bytes | dict[str, Any]) -> tuple[Row, Program]:
    """A line of the release -> its row, and its answer as a program. Raises ValueError with the reason."""
    data = json.loads(line.decode("utf-8")) if isinstance(line, bytes) else line
    if not isinstance(data, dict) or not isinstance(data.get("task_id"), int) or data["task_id"] < 1:
        raise ValueError("not an object with a task_id, a number from 1")
    texts = [data.get("text"), data.get("code"), data.get("test_setup_code") or "", *(data.get("test_list") or [None])]
    if not all(isinstance(text, str) for text in texts) or not all(text.strip() for text in texts[:2]):
        raise ValueError(f"task {data['task_id']}: text, code and test_list are needed, and all must be text")
    # Upstream's line ends are CRLF. Tabs and spaces at the end of inner lines stay: they can stand within a string.
    text, code, setup, *tests = (text.replace("\r\n", "\n").strip("\r\n").rstrip() for text in texts)
    try:
        split_tests(tests)
    except DataError as error:
        raise ValueError(f"task {data['task_id']}: {error}") from None
    # the function's name and arguments stand only in the tests
    number, query = data["task_id"], "\n".join([f"NL Question: {text}", "Three Test Cases:", *tests])
    limits = Limits(seconds=SLOW[number]) if number in SLOW else None
    return Row(str(number), query, code), Program(code, tuple(tests), setup, limits)
