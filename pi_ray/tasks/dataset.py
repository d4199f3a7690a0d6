"""What tasks share that read data: a stable choice of n rows, a hash of the files, the names used most, and rows from the hub."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from heapq import nsmallest
from pathlib import Path
from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.protocols import UNLABELLED, Reject, Row
from pi_ray.run.artifact import digest, digest_file

LIKE_TRAIN, UNSEEN = "like train", "template only"


def limit_rows(read: Callable[[], Iterator[Row | Reject]], n: int) -> Iterator[Row | Reject]:
    """All that `read` gives, or with n > 0 at most n of its rows in their order: those whose ids have the smallest sha256.

    The choice does not depend on the order of the file, and a larger n keeps the rows of a smaller one. It costs one more pass,
    in which n ids are held. Rejects are passed on whether or not their rows would have been chosen.
    """
    if not n:
        yield from read()
        return
    chosen = set(nsmallest(n, (row.id for row in read() if isinstance(row, Row)), key=lambda i: hashlib.sha256(i.encode()).digest()))
    yield from (row for row in read() if isinstance(row, Reject) or row.id in chosen)


def select_rows(read: Callable[[str], Iterator[Row | Reject]], config: TaskConfig, split: str) -> Iterator[Row | Reject]:
    """`limited` to what `task.rows` says of the split; "unlabelled" are the training rows that it leaves out, without their answers.

    With `task.unseen`, no training row has an answer that uses one of those names, and dev and test rows are in one of two groups: LIKE_TRAIN, UNSEEN.
    """
    rows, unseen = config.rows, [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in config.unseen]

    def uses(row: Row) -> bool:
        return any(name.search(row.answer) for name in unseen)

    def known(split: str) -> Iterator[Row | Reject]:
        for row in read(split):
            if not unseen or isinstance(row, Reject):
                yield row
            elif split != "train":
                yield replace(row, group=UNSEEN if uses(row) else LIKE_TRAIN)
            elif not uses(row):
                yield row

    if split != UNLABELLED:
        yield from limit_rows(lambda: known(split), getattr(rows, split))
    elif rows.train or unseen:
        labelled = {row.id for row in limit_rows(lambda: known("train"), rows.train) if isinstance(row, Row)}

        def rest() -> Iterator[Row | Reject]:
            yield from (replace(row, answer="") for row in read("train") if isinstance(row, Row) and row.id not in labelled)

        yield from limit_rows(rest, rows.unlabelled)


def fingerprint_files(config: TaskConfig, paths: Iterable[Path]) -> str:
    """Hash of the row limits, the names not to be seen, and of the contents of `paths`, streamed; a missing file counts as such."""
    unseen = [sorted(config.unseen)] if config.unseen else []
    return digest([config.rows.model_dump(), *unseen, [digest_file(path) if path.is_file() else None for path in paths]])


def most_used(names: Iterable[str], known: Container[str], n: int) -> list[str]:
    """The `n` commonest of those `names` that are `known`, commonest first, ties alphabetically."""
    counts = Counter(name for name in names if name in known)
    return sorted(counts, key=lambda name: (-counts[name], name))[:n]


def load_hub_rows(name: str, split: str) -> Iterable[dict[str, Any]]:
    """Rows of a hub data set, read from the parquet copy that the hub keeps of it: a set's own loading script is never run.

    Raises DataError when the package `datasets` is missing or the hub does not answer.
    """
    cure = f"or set task.folder to a folder that holds the files; without it the data is {name} on the hub"
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"the package datasets is missing: pip install datasets, {cure}") from None
    try:
        return load_dataset(name, split="validation" if split == "dev" else split, revision="refs/convert/parquet")
    except Exception as error:  # no network, refused, gone: datasets raises some ten unrelated types for these
        raise DataError(f"the hub did not give the data ({type(error).__name__}: {error}): connect, {cure}") from None
