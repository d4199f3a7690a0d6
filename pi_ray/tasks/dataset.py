"""Shared parts of tasks: base class over published data sets, scores of all rows, a stable choice of n rows, hashes."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from heapq import nsmallest
from importlib.resources import files
from pathlib import Path
from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.metrics import exact_match
from pi_ray.prompt import Template
from pi_ray.protocols import UNLABELLED, Reject, Row, Task
from pi_ray.run.artifact import digest, digest_file

LIKE_TRAIN, UNSEEN = "like train", "template only"
OPENING, SEPARATOR = re.compile(r"\s*\[\s*(\])?\s*"), re.compile(r"\s*(?:,|(\]))\s*")  # group 1: the array ends


class DatasetTask:
    """Base of the tasks over published data sets, whose files stand in `task.folder`; scored by exact match.

    A subclass names its template file, its data files and where to get them, and implements `read_split`; also
    `documents` where `task.docs` can replace the documents that ship with the task.
    """

    template_file: str
    data_files: tuple[str, ...]
    must_hold: str  # what `task.folder` must hold, and who publishes it

    def __init__(self, config: TaskConfig):
        self.config = config
        self.folder = Path(config.folder)
        self.unseen = config.unseen  # names that no labelled training answer uses

    def read_split(self, split: str) -> Iterator[Row | Reject]:
        """All rows of the split. Raises DataError where the data cannot be had."""
        raise NotImplementedError

    def documents(self) -> tuple[str, ...]:
        """The template's documents from `task.docs`; none: those that ship with the task. Raises DataError."""
        return ()

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Rows within `task.rows`; "unlabelled" are the training rows left out, without their answers.

        With `task.unseen`, no training answer uses one of the names, and dev and test rows are LIKE_TRAIN or UNSEEN.
        """
        limits = self.config.rows
        if split != UNLABELLED:
            yield from limit_rows(lambda: self._labelled(split), getattr(limits, split))
        elif limits.train or self.unseen:
            used = {row.id for row in self.rows("train") if isinstance(row, Row)}

            def unused() -> Iterator[Row]:
                for row in self.read_split("train"):
                    if isinstance(row, Row) and row.id not in used:
                        yield replace(row, answer="")

            yield from limit_rows(unused, limits.unlabelled)

    def _labelled(self, split: str) -> Iterator[Row | Reject]:
        unseen = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in self.unseen]
        for row in self.read_split(split):
            if not unseen or isinstance(row, Reject):
                yield row
                continue
            uses_unseen = any(name.search(row.answer) for name in unseen)
            if split != "train":
                yield replace(row, group=UNSEEN if uses_unseen else LIKE_TRAIN)
            elif not uses_unseen:
                yield row

    def template(self) -> Template:
        """Raises DataError where `task.docs` has nothing to use."""
        template = Template.parse(files("pi_ray.tasks").joinpath(self.template_file).read_text(encoding="utf-8"))
        documents = self.documents() if self.config.docs else ()
        return Template(template.instruction, documents or template.documents)

    def score(self, row: Row, output: str) -> dict[str, float]:
        return {"exact_match": exact_match(output, row.answer)}

    def fingerprint(self) -> str:
        paths = [self.folder / name for name in self.data_files] if self.config.folder else []
        hidden = [sorted(self.unseen)] if self.unseen else []  # by task.unseen, or as the task chooses them
        return digest([self.template().text, *hidden, fingerprint_files(self.config, paths)])

    def require_files(self) -> None:
        """Raises DataError where a data file is missing."""
        folder = self.config.folder
        if missing := [name for name in self.data_files if not folder or not (self.folder / name).is_file()]:
            raise DataError(f"task.folder '{folder}' lacks {', '.join(missing)}: it must hold {self.must_hold}")

    def load_from_hub(self, name: str, *arguments: str, **options: str) -> Any:
        """A hub data set, as `datasets.load_dataset` gives it. Raises DataError without that package or an answer."""
        names = ", ".join(self.data_files)
        cure = f"or set task.folder to a folder with {names}; without it the data is {name} on the hub"
        try:
            from datasets import load_dataset
        except ImportError:
            raise DataError(f"the package datasets is missing: pip install datasets, {cure}") from None
        try:
            return load_dataset(name, *arguments, **options)
        except Exception as error:  # no network, refused, gone: datasets raises some ten unrelated types for these
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"the hub did not give the data ({reason}): connect, {cure}") from None

    def load_hub_rows(self, name: str, split: str) -> Iterable[dict[str, Any]]:
        """Rows of a hub data set, from the hub's parquet copy: a data set's own loading script is never run."""
        part = "validation" if split == "dev" else split
        return self.load_from_hub(name, split=part, revision="refs/convert/parquet")

    def most_used(self, names: Callable[[str], Iterable[str]], known: Container[str], cure: str) -> list[str]:
        """The `task.docs_count` commonest `known` names in training answers. Raises DataError with `cure` for none."""
        answers = (row.answer for row in self.read_split("train") if isinstance(row, Row))
        counts = Counter(name for answer in answers for name in names(answer) if name in known)
        if not counts:
            raise DataError(f"task.docs '{self.config.docs}' {cure}")
        return sorted(counts, key=lambda name: (-counts[name], name))[: self.config.docs_count]


def score_rows(task: Task, rows: Sequence[Row], texts: Sequence[str]) -> list[dict[str, float]]:
    """The metrics of each row; a task whose scoring is work (running programs) takes all rows at once."""
    at_once = getattr(task, "score_all", None)
    return at_once(rows, texts) if at_once else [task.score(row, text) for row, text in zip(rows, texts, strict=True)]


def limit_rows(read: Callable[[], Iterator[Row | Reject]], n: int) -> Iterator[Row | Reject]:
    """Rejects and, for n > 0 in a second pass, the n rows whose ids have the smallest sha256, else all; order is kept.

    The choice does not depend on the order of the file, and a larger n keeps the rows of a smaller one.
    """
    if not n:
        yield from read()
        return
    ids = (row.id for row in read() if isinstance(row, Row))
    chosen = set(nsmallest(n, ids, key=lambda i: hashlib.sha256(i.encode()).digest()))
    yield from (row for row in read() if isinstance(row, Reject) or row.id in chosen)


def fingerprint_files(config: TaskConfig, paths: Iterable[Path]) -> str:
    """Hash of the row limits, the unseen names and the contents of `paths`; a missing file counts as such."""
    unseen = [sorted(config.unseen)] if config.unseen else []
    contents = [digest_file(path) if path.is_file() else None for path in paths]
    return digest([config.rows.model_dump(), *unseen, contents])


def read_array(path: Path, cure: str) -> Iterator[tuple[int, Any]]:
    """(position from 1, object) of a JSON array, never all in memory. Raises DataError, which ends with `cure`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        decode, number, mark = json.JSONDecoder().raw_decode, 0, OPENING.match(text)
        while mark and not mark[1]:
            found, end = decode(text, mark.end())
            number += 1
            yield number, found
            mark = SEPARATOR.match(text, end)
        if not mark or mark.end() < len(text):
            raise ValueError(f"a bracket or comma is missing, or text follows, at object {number + 1}")
    except (ValueError, RecursionError) as error:  # ValueError: also where it is not UTF-8
        raise DataError(f"{path}: not a JSON array in UTF-8 ({error}); {cure}") from None
