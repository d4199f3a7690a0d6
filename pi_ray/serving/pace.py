"""How often pieces of text leave a replica: each is a message through two more processes, which costs about as much as a step of decoding for its row."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

PIECES = 100  # a second, of all answers of a replica
LONGEST_S = 0.2  # that a piece waits while others come


class Pace:
    """Of one replica. The more answers it streams, the longer each one's pieces are; a single answer's leave as they come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.open = 0

    async def keep(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """The events of an answer, its {"text"} pieces joined to those that come soon after. The first one goes at once, and nothing is held back at the end."""
        held: dict[str, Any] = {}
        sent = float("-inf")
        self.open += 1
        try:
            async with aclosing(events):
                async for event in events:
                    if "text" not in event:
                        if held:
                            yield held
                        held = {}
                        yield event
                        continue
                    held = {key: held[key] + value for key, value in event.items()} if held else event
                    if self.clock() - sent >= min(self.open / PIECES, LONGEST_S):
                        yield held
                        held, sent = {}, self.clock()
                if held:
                    yield held
        finally:
            self.open -= 1
