"""Several answers to one HTTP request: their events as one stream, and their token usage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from pi_ray.serve.engine.completion import CompletionRequest, Events


async def merge_streams(backend: Any, requests: Sequence[CompletionRequest]) -> Events:
    """Events of all requests as they come, each with its "index". A failure, or closing the iterator, ends all."""
    if len(requests) == 1:
        async with aclosing(backend.complete(requests[0])) as events:
            async for event in events:
                yield {**event, "index": 0}
        return
    queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(backend, each, index, queue)) for index, each in enumerate(requests)]
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


async def _pump(backend: Any, request: CompletionRequest, index: int, queue: asyncio.Queue[Any]) -> None:
    try:
        async with aclosing(backend.complete(request)) as events:
            async for event in events:
                queue.put_nowait({**event, "index": index})
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


class UsageCounter:
    """Adds up the tokens of a request as its events pass. A prompt counts once, however many answers it gets."""

    def __init__(self, choices: int):
        self._choices = choices  # answers to each prompt, whose indices are neighbours
        self._prompt = self._completion = self._saved = 0

    def add(self, event: dict[str, Any]) -> None:
        if "prompt_tokens" in event and event["index"] % self._choices == 0:
            self._prompt += event["prompt_tokens"]
            self._saved += event["saved"]
        self._completion += event.get("completion_tokens", 0)

    def usage(self) -> dict[str, int]:
        """OpenAI's usage, and `prompt_tokens_saved`: tokens of template and examples that the model need not read."""
        return {
            "prompt_tokens": self._prompt, "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion, "prompt_tokens_saved": self._saved,
        }  # fmt: skip
