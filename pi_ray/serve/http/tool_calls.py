"""Tool calls in the text that a model generates, found while it is streamed."""

import uuid
from collections.abc import Collection
from contextlib import aclosing
from typing import Any

from pi_ray.conversation import parse_tool_calls
from pi_ray.conversation.tool_calls import END, START, is_broken_call, read_call
from pi_ray.serve.engine.completion import Events


class ToolCallReader:
    """Text in pieces -> content and whole calls, the same as parse_tool_calls finds in all of it.

    What may be a call is held back until it is one; what has not become one by the end is content.
    """

    def __init__(self, bare: bool = True, known: Collection[str] | None = None):
        self._bare, self._known = bare, known  # as parse_tool_calls has them
        self._held = ""  # text that is neither content nor a call yet
        self._space = ""  # at the end of the content so far
        self.has_calls = self._has_content = False

    def push(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """The content and the calls that are certain after this piece."""
        self._held += piece
        content, functions = "", list[dict[str, Any]]()
        while (start := self._held.find(START)) >= 0 and not self._may_be_bare():
            content += self._release(start)
            function, end = read_call(self._held, len(START), self._known) if END in self._held else (None, 0)
            if not function and END in self._held and is_broken_call(self._held, len(START)):
                content += self._release(len(START))
                continue
            if not function:
                return content, _with_ids(functions)
            functions.append(function)
            self._held, self.has_calls = self._held[end:], True
        if not self._may_be_bare():
            marks = (n for n in range(len(START) - 1, 0, -1) if self._held.endswith(START[:n]))
            content += self._release(len(self._held) - next(marks, 0))
        return content, _with_ids(functions)

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The same once no more text comes."""
        content, calls = parse_tool_calls(self._held, self._bare, self._known)
        self._held, self.has_calls = content, self.has_calls or bool(calls)
        return self._release(len(content)), _with_ids([call["function"] for call in calls])

    def _may_be_bare(self) -> bool:
        """Whether all of the answer may be a call without marks."""
        is_first = not (self._has_content or self.has_calls)
        return self._bare and is_first and self._held.lstrip()[:1] in ("{", "[")

    def _release(self, end: int) -> str:
        """Content up to `end` of the held text. White space at its end waits for more content."""
        text, self._held = self._space + self._held[:end], self._held[end:]
        shown = text.rstrip()
        self._space = text[len(shown) :]
        shown = shown if self._has_content else shown.lstrip()
        self._has_content |= bool(shown)
        return shown


def _with_ids(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": each} for each in functions]


async def split_tool_calls(events: Events) -> Events:
    """The events of answers, with the calls of those that may call taken out of "text" into "tool_calls".

    An answer with calls ends with {"finish": "tool_calls"}, unless it was cut off.
    """
    readers: dict[int, ToolCallReader] = {}  # by the index of the answer
    async with aclosing(events):
        async for event in events:
            if event.get("may_call"):
                readers[event["index"]] = ToolCallReader(event["bare_calls"], event["functions"])
            elif reader := readers.get(event["index"]):
                event = _split_event(event, reader)
            yield event


def _split_event(event: dict[str, Any], reader: ToolCallReader) -> dict[str, Any]:
    content, calls = reader.push(event.pop("text", ""))
    if finish := event.get("finish"):
        rest, last = reader.finish()
        content, calls = content + rest, calls + last
        event["finish"] = "tool_calls" if reader.has_calls and finish == "stop" else finish
    return {**event, **({"text": content} if content else {}), **({"tool_calls": calls} if calls else {})}
