"""A request in the engine, and the way of its tokens back to the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pi_ray.protocols import GenerationRequest, Token
from pi_ray.serve.engine.prefix_cache import Block
from pi_ray.serve.engine.sampling import Sampler

Item = Token | Exception | None  # an error ends the request, None is its end


class Row:
    """Made in the caller's event loop, filled by the decoding thread."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.sampler = Sampler.of(request)
        self.tokens: list[int] = []
        self.adapter = 0  # its slot in the stack
        self.known: list[Block] = []  # what the prefix cache had of the prompt
        self.waited = 0  # steps that others went first, because its adapter found no place
        self.alone = False  # a pass that it took part in failed
        self.closed = False  # the caller went away; the thread drops the row before its next step
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()


class Post:
    """From the decoding thread to the callers: one call into each event loop a step, however many rows it has."""

    def __init__(self) -> None:
        self._items: dict[Any, list[tuple[Row, Item]]] = {}

    def put(self, row: Row, item: Item) -> None:
        self._items.setdefault(row.loop, []).append((row, item))

    def send(self) -> None:
        for loop, items in self._items.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:  # the callers' event loop is gone
                for row, _ in items:
                    row.closed = True
        self._items = {}


def _deliver(items: Sequence[tuple[Row, Item]]) -> None:
    for row, item in items:
        row.queue.put_nowait(item)
