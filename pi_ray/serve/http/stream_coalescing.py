"""How often events leave a replica: each is a message through two more processes, which costs about as much as a step of decoding for its row."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

PIECES = 100  # a second, of all answers of a replica
LONGEST_S = 0.2  # that a piece waits while others come


class Pace:
    """Of one replica. The more answers it streams, the longer each one's pieces are; a single answer's leave as they come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.open = 0

    async def keep(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """The events of an answer, its {"text"} pieces joined to those that come soon after. The first one goes at once, and the last one with the end."""
        held: dict[str, Any] = {}
        sent = float("-inf")
        self.open += 1
        coming = _next(events)
        try:
            while event := await coming:
                coming = _next(events)
                if "text" not in event:
                    yield {**held, **event}
                    held = {}
                    continue
                held = {key: held[key] + value for key, value in event.items()} if held else event
                await asyncio.sleep(0)  # what comes with it, such as the end, goes with it
                if not coming.done() and self.clock() - sent >= min(self.open / PIECES, LONGEST_S):
                    yield held
                    held, sent = {}, self.clock()
            if held:
                yield held
        finally:
            self.open -= 1
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):  # told already, or nobody asks any more
                await coming
            async with aclosing(events):
                pass


def _next(events: AsyncIterator[dict[str, Any]]) -> asyncio.Task[dict[str, Any]]:
    """The next event; an empty one at the end."""
    return asyncio.ensure_future(anext(events, {}))
