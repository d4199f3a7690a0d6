"""Prefetching: the next item of a series is made in a background thread while the present one is used."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """`prefetcher[i]` is `make(i)`; `make(i + 1)` then starts in the background, below `count` and where `can_make`.

    What `make` raises is raised where the item is asked for. Only the present and the next item are kept.
    """

    def __init__(self, make: Callable[[int], T], count: int, can_make: Callable[[int], bool] = lambda i: True):
        self.make, self.count, self.can_make = make, count, can_make
        self.thread = ThreadPoolExecutor(1)
        self.futures: dict[int, Future[T]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> T:
        if not 0 <= i < self.count:
            raise IndexError(i)
        wanted = [i, *([i + 1] if i + 1 < self.count and self.can_make(i + 1) else [])]
        for old in set(self.futures) - set(wanted):
            self.futures.pop(old).cancel()
        for n in wanted:
            if n not in self.futures:
                self.futures[n] = self.thread.submit(self.make, n)
        return self.futures[i].result()

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
