"""Requests of a log: messages, tools and the response beside them, in any of the usual forms, checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi_ray.conversation import check_messages, check_tools, content_text
from pi_ray.protocols import Reject
from pi_ray.tasks.jsonl import MAX_FIELD, parse_line, read_contents

RESPONSES = ("response", "completion", "output")  # keys that loggers put a response under
CUT_OFF = ("length", "content_filter")  # reasons to finish that leave an answer which is not whole
KEPT = ("tool_calls", "tool_call_id")  # of a message, beside role and content; the rest is a client's own
Message = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One request: its system message, its tools as sent, and the turns after these, with the answer where it has one.
    """

    system: str
    tools: str  # JSON of the list; "" for none
    turns: tuple[Message, ...]
    line: int = 0  # of the log, or position in its array

    @property
    def asked(self) -> tuple[Message, ...]:
        """The turns without a last answer."""
        return self.turns[:-1] if self.turns[-1]["role"] == "assistant" else self.turns


def read_requests(path: Path) -> Iterator[Request | Reject]:
    """The requests of a log in their order; a Reject for one that cannot be used. Raises DataError for a bad array."""
    for number, content in read_contents(path):
        try:
            yield parse_request(parse_line(content) if isinstance(content, bytes) else content, number)
        except ValueError as reason:
            yield Reject(str(path), number, str(reason))


def parse_request(data: Any, line: int = 0) -> Request:
    """One object of a log -> Request. Raises ValueError with the reason why it cannot be used."""
    data = _object(data, "a line")
    request = _body(data["request"], "request") if "request" in data else _body(data, "a line")
    if not isinstance(given := request.get("messages"), list) or not given:
        raise ValueError("missing field: a request has 'messages', a list that is not empty")
    answer = _answer(data)
    messages = _join_system([*given, answer] if answer else given)
    check_messages(messages)
    tools = request.get("tools") or data.get("tools") or []
    check_tools(tools)
    turns = tuple(_message(message) for message in messages)
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    turns = turns[1:] if turns[0]["role"] == "system" else turns
    if not turns:
        raise ValueError("the conversation has no user's message")
    return Request(system, json.dumps(tools, ensure_ascii=False) if tools else "", turns, line)


def _object(value: Any, name: str) -> dict[str, Any]:
    """`value` as an object; loggers also keep one as its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{name} is text that is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"wrong type: {name} must be an object")
    return value


def _body(value: Any, name: str) -> dict[str, Any]:
    """A request or response, also where an HTTP client or the batch API has put it into a `body`."""
    found = _object(value, name)
    return _object(found["body"], f"{name}'s body") if "body" in found else found


def _join_system(messages: list[Any]) -> list[Any]:
    """The messages with those of the system or developer that stand first as one. Raises ValueError for images."""
    texts = list[str]()
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer"):
            break
        texts.append(content_text(message.get("content"), "the system message"))
    joined = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    return [*joined, *messages[len(texts) :]]


def _message(given: Message) -> Message:
    """A checked message with the fields that count, and its text in one piece. Raises ValueError for a huge one."""
    text = content_text(given.get("content"))
    if (size := len(text.encode())) > MAX_FIELD:
        raise ValueError(f"a message has {size:,} bytes; at most {MAX_FIELD:,} are taken")
    kept = {key: given[key] for key in KEPT if given.get(key)}
    return {"role": given["role"], "content": text if text or not kept.get("tool_calls") else None, **kept}


def _is_body(text: str) -> bool:
    """Whether a response is an API's as JSON text; other JSON is the answer itself."""
    try:
        found = _body(text, "the response")
    except ValueError:
        return False
    message, error = found.get("message", found), found.get("error")
    is_message = isinstance(message, dict) and message.get("role") == "assistant"
    return "choices" in found or is_message or (isinstance(error, dict) and "message" in error)


def _answer(data: dict[str, Any]) -> Message | None:
    """The response's message; None where there is no response, or none that could be learned from."""
    found = next((data[name] for name in RESPONSES if data.get(name)), data if "choices" in data else None)
    if found is None:
        return None
    if isinstance(found, str) and not _is_body(found):
        return {"role": "assistant", "content": found}
    found = _body(found, "the response")
    if found.get("error"):
        return None
    if "choices" in found:
        choices = found["choices"]
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ValueError("wrong type: the response's choices must be a list of objects")
        if not choices or choices[0].get("finish_reason") in CUT_OFF:
            return None
        found = choices[0]
    message = found.get("message", found)
    if not isinstance(message, dict) or message.get("role", "assistant") != "assistant":
        raise ValueError("the response is no assistant's message, such as choices[0].message")
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else content
    says = text or message.get("tool_calls") or message.get("function_call")
    return {**message, "role": "assistant"} if says else None
