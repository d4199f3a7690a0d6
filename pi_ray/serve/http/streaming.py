"""Several answers to one request: their events as one stream, and what they add up to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from pi_ray.serve.engine.completion import Ask


async def together(backend: Any, asks: Sequence[Ask]) -> AsyncIterator[dict[str, Any]]:
    """The events of all asks as they come, each with its "index". The first failure ends them all; so does closing the iterator."""
    if len(asks) == 1:
        async with aclosing(backend.complete(asks[0])) as events:
            async for event in events:
                yield {**event, "index": 0}
        return
    queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(backend, ask, index, queue)) for index, ask in enumerate(asks)]
    try:
        ended = 0
        while ended < len(tasks):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended += 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(backend: Any, ask: Ask, index: int, queue: asyncio.Queue[Any]) -> None:
    try:
        async with aclosing(backend.complete(ask)) as events:
            async for event in events:
                queue.put_nowait({**event, "index": index})
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


class Usage:
    """Tokens of a request, added up as its events pass. A prompt counts once, however many answers it gets."""

    def __init__(self, choices: int):
        self._choices = choices  # answers to each prompt, which stand side by side
        self._sent = self._made = self._saved = 0

    def see(self, event: dict[str, Any]) -> None:
        if "prompt_tokens" in event and event["index"] % self._choices == 0:
            self._sent += event["prompt_tokens"]
            self._saved += event["saved"]
        self._made += event.get("completion_tokens", 0)

    def body(self) -> dict[str, int]:
        """`prompt_tokens_saved` is pi-ray's own: the tokens of template and examples that the model need not read."""
        return {"prompt_tokens": self._sent, "completion_tokens": self._made, "total_tokens": self._sent + self._made, "prompt_tokens_saved": self._saved}
