"""The next of a row of things, made in a background thread while the present one is used: batches of updates, datasets of phases."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`ahead[i]` is `make(i)`. Asking for it starts `make(i + 1)` in the background, where `i + 1` is below `count` and `may(i + 1)`.

    What `make` raises is raised where the thing is asked for. Only the present and the next one are held.
    """

    def __init__(self, make: Callable[[int], T], count: int, may: Callable[[int], bool] = lambda i: True):
        self.make, self.count, self.may = make, count, may
        self.thread = ThreadPoolExecutor(1)
        self.held: dict[int, Future[T]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> T:
        if not 0 <= i < self.count:
            raise IndexError(i)
        wanted = [i, *([i + 1] if i + 1 < self.count and self.may(i + 1) else [])]
        for old in set(self.held) - set(wanted):
            self.held.pop(old).cancel()
        for n in wanted:
            if n not in self.held:
                self.held[n] = self.thread.submit(self.make, n)
        return self.held[i].result()

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
