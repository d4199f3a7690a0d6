"""Joins pieces of streamed text in a replica: each event is a message, as dear as a decoding step of its sequence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pi_ray.serve.engine.completion import Events

EVENTS_PER_S = 100  # of all answers of a replica together
MAX_DELAY_S = 0.2  # how long a piece may wait for the next ones


class StreamCoalescer:
    """One for each replica. The more answers it streams, the longer their pieces are; a single one's are not joined."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.streams = 0

    async def coalesce(self, events: Events) -> Events:
        """The same events, {"text"} pieces joined to those that follow soon. The first piece leaves at once."""
        pending: dict[str, Any] = {}
        sent = float("-inf")
        self.streams += 1
        coming = _next_event(events)
        try:
            while event := await coming:
                coming = _next_event(events)
                if "text" not in event:
                    yield {**pending, **event}
                    pending = {}
                    continue
                pending = {key: pending[key] + value for key, value in event.items()} if pending else event
                await asyncio.sleep(0)  # an event that is ready by now, such as the end, goes with it
                if not coming.done() and self.clock() - sent >= min(self.streams / EVENTS_PER_S, MAX_DELAY_S):
                    yield pending
                    pending, sent = {}, self.clock()
            if pending:
                yield pending
        finally:
            self.streams -= 1
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):  # raised already, or nobody asks any more
                await coming
            await events.aclose()


def _next_event(events: Events) -> asyncio.Task[dict[str, Any]]:
    """The next event; an empty one at the end."""
    return asyncio.ensure_future(anext(events, {}))
