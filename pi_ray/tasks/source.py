"""What tasks that read files share: a stable choice of n rows, and a hash of the files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from heapq import nsmallest
from pathlib import Path

from pi_ray.artifact import digest, digest_file
from pi_ray.config import TaskConfig
from pi_ray.protocols import Reject, Row


def limited(read: Callable[[], Iterator[Row | Reject]], n: int) -> Iterator[Row | Reject]:
    """All that `read` gives, or with n > 0 at most n of its rows in their order: those whose ids have the smallest sha256.

    The choice does not depend on the order of the file, and a larger n keeps the rows of a smaller one. It costs one more pass,
    in which n ids are held. Rejects are passed on whether or not their rows would have been chosen.
    """
    if not n:
        yield from read()
        return
    chosen = set(nsmallest(n, (row.id for row in read() if isinstance(row, Row)), key=lambda i: hashlib.sha256(i.encode()).digest()))
    yield from (row for row in read() if isinstance(row, Reject) or row.id in chosen)


def fingerprint(config: TaskConfig, paths: Iterable[Path]) -> str:
    """Hash of the row limits and of the contents of `paths`, streamed; a missing file counts as such."""
    return digest([config.rows.model_dump(), [digest_file(path) if path.is_file() else None for path in paths]])
