"""Streams of events: several answers to one HTTP request as one, their token usage, and pieces of text joined."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from fastapi.responses import StreamingResponse

from pi_ray.serve.engine.completion import Events
from pi_ray.serve.engine.request import CompletionRequest

EVENTS_PER_S = 100  # of all answers of a replica together
MAX_DELAY_S = 0.2  # how long a piece may wait for the next ones


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
        for _ in tasks:  # each puts None behind its last event
            while item := await queue.get():
                if isinstance(item, Exception):
                    raise item
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


class EventStreamResponse(StreamingResponse):
    """Server-sent events. `events` are closed however the response ends, also where it never began to read them."""

    def __init__(self, content: AsyncIterator[str], events: Events, headers: Mapping[str, str]):
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


class UsageCounter:
    """Adds up the tokens of a request as its events pass. A prompt counts once, however many answers it gets."""

    def __init__(self, choices: int):
        self._choices = choices  # answers to each prompt, whose indices are neighbours
        self._prompt = self._completion = self._saved = 0
        self._unfinished: Counter[int] = Counter()  # tokens of each answer under way

    def add(self, event: dict[str, Any]) -> None:
        if "prompt_tokens" in event and event["index"] % self._choices == 0:
            self._prompt += event["prompt_tokens"]
            self._saved += event["saved"]
        self._completion += event.get("completion_tokens", 0)
        self._unfinished[event["index"]] += event.get("tokens", 0)
        if "finish" in event:
            del self._unfinished[event["index"]]

    @property
    def spent(self) -> int:
        """Tokens read and generated so far, those of an answer that was broken off up to its last piece."""
        return self._prompt + self._completion + self._unfinished.total()

    def usage(self) -> dict[str, int]:
        """OpenAI's usage, and `prompt_tokens_saved`: tokens of template and examples that the model need not read."""
        return {
            "prompt_tokens": self._prompt, "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion, "prompt_tokens_saved": self._saved,
        }


class StreamCoalescer:
    """Joins pieces of streamed text in a replica, where each event is a message, as dear as a decoding step.

    The more answers the replica streams, the longer their pieces are; a single one's are not joined.
    """

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
