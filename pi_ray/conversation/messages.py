"""Messages in OpenAI's form: which conversations are taken, and the reason for which another is not."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

MAX_MESSAGES = 1000
MAX_NESTING = 64  # levels of a JSON value
NO_CHARACTER = re.compile("[\ud800-\udfff]")
DUMPED = '[{"role": "'  # how a dumped conversation begins
ROLES = ("system", "user", "assistant", "tool")
encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # json.dumps makes one for each value
# role -> roles that may follow. A tool's result may follow another one's; calls must have been made in any case.
FOLLOWS = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def check_messages(messages: Any) -> None:
    """Raise ValueError, with the reason in a sentence, unless `messages` are a conversation that pi-ray takes.

    After a system message, if there is one, user and assistant take turns; an assistant's tool calls are followed by
    one result each, in any order, before it goes on. The conversation may end after any message, but not between the
    results of one turn.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of messages, and not empty")
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"the conversation has {len(messages):,} messages; at most {MAX_MESSAGES:,} are taken")
    before, missing = "", set[str]()  # role of the message before; ids of calls without a result yet
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{name} must be an object with a role of {', '.join(ROLES)}")
        role, text = message["role"], content_text(message.get("content"), f"{name}.content")
        if role != "assistant" and message.get("tool_calls"):
            raise ValueError(f"{name} is of role {role} and has tool_calls, which only an assistant's message may have")
        if role == "system":
            if i:
                raise ValueError(f"roles out of order: {name} is a system message, which can only be the first one")
            continue
        if role not in FOLLOWS[before]:
            raise ValueError(f"roles out of order: {name} is of role {role}, {_after(before)}")
        if role == "tool":
            _check_result(message, missing, name)
        elif missing:
            raise ValueError(f"{name}: the tool call '{min(missing)}' before it has no result")
        elif role == "assistant":
            missing = _check_calls(message.get("tool_calls"), name)
            if not text.strip() and not missing:
                raise ValueError(f"{name} is an empty assistant turn: it has neither content nor tool calls")
            if message.get("function_call"):
                raise ValueError(f"{name} has a function_call, which is outdated; write it as tool_calls")
        elif not text.strip():
            raise ValueError(f"{name}.content is empty")
        before = role
    if before == "tool" and missing:
        raise ValueError(f"the conversation ends before the tool call '{min(missing)}' has a result")


def content_text(content: Any, name: str = "content") -> str:
    """The text of a message's content: text, null or a list of text parts. Raises ValueError for anything else."""
    if content is None:
        return ""
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise ValueError(f"{name} has a part of type {other[0]!r}; only text is taken, no images, audio or files")
        return "".join(content_text(part.get("text"), f"{name}.text") for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name} must be text")
    if "\0" in content or (not content.isascii() and NO_CHARACTER.search(content)):
        raise ValueError(f"{name} holds a NUL character or half of a surrogate pair, which is not a character")
    return content


def read_arguments(text: Any, name: str = "arguments") -> dict[str, Any]:
    """The arguments of a tool call, JSON text of an object. Raises ValueError."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text that holds a JSON object, as OpenAI's API has it")
    try:
        found = json.loads(content_text(text, name), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a JSON object, not {text[:40]!r}")
    check_json(found, name)
    return found


def check_json(value: Any, name: str) -> None:
    """Raise ValueError where a JSON value holds half of a surrogate pair, also as an escape, or no finite number, or
    is nested deeper than MAX_NESTING.
    """
    try:
        text = encode_json(value)
        is_nested = text.count("{") + text.count("[") > MAX_NESTING and _is_deep(value)
    except RecursionError:
        is_nested = True
    except ValueError as error:
        raise ValueError(f"{name} holds a number beyond the largest one of JSON: {error}") from None
    if is_nested:
        raise ValueError(f"{name} is too deep: JSON of at most {MAX_NESTING} levels is taken")
    content_text(text, name)


def _is_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than MAX_NESTING."""
    level: list[Any] = [[value]]
    for _ in range(MAX_NESTING + 1):
        values = chain.from_iterable(inner.values() if isinstance(inner, dict) else inner for inner in level)
        level = [inner for inner in values if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_calls(calls: Any, name: str) -> set[str]:
    """The ids of an assistant's tool calls."""
    ids = set[str]()
    if not isinstance(calls or [], list):
        raise ValueError(f"{name}.tool_calls must be a list")
    for i, call in enumerate(calls or ()):
        where = f"{name}.tool_calls[{i}]"
        function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else 0
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            raise ValueError(f"{where} must be of type function, with the name of a function")
        read_arguments(function.get("arguments"), f"{where}.function.arguments")
        if not _is_name(call.get("id")) or call["id"] in ids:
            raise ValueError(f"{where} must have an id of its own, by which its result names it")
        ids.add(call["id"])
    return ids


def _check_result(message: dict[str, Any], missing: set[str], name: str) -> None:
    """Take the call that a tool's result answers out of `missing`."""
    call = message.get("tool_call_id")
    if not isinstance(call, str) or call not in missing:
        raise ValueError(f"{name} is a tool result without its call: no call before it has the id {call!r}")
    missing.remove(call)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(content_text(value).strip())


def _after(role: str) -> str:
    return f"after one of role {role}" if role else "where the user's first message is expected"


def dump_messages(messages: Sequence[dict[str, Any]]) -> str:
    """Messages as the text of a row's query: what the model sees of them, and nothing else. Raises ValueError."""
    check_messages(list(messages))
    return json.dumps([_plain_message(message) for message in messages], ensure_ascii=False)


def load_messages(query: str) -> list[dict[str, Any]]:
    """The messages of a row's query; any other text is one message of a user."""
    if query.startswith(DUMPED):
        with suppress(ValueError, RecursionError):
            messages = json.loads(query)
            check_messages(messages)
            return messages
    return [{"role": "user", "content": query}]


def last_messages(query: str) -> str:
    """A row's query for people: of a conversation what came after the assistant's last turn, other text as it is."""
    messages = load_messages(query) if query.startswith(DUMPED) else []
    if not messages:
        return query
    begin = max((i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    before = [f"({begin} messages before)"] if begin else []
    return "\n".join([*before, *(f"{m['role']}: {m['content']}" for m in messages[begin:])])


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    kept = {"role": message["role"], "content": content_text(message.get("content"))}
    if calls := message.get("tool_calls"):
        kept["tool_calls"] = [
            {"id": c["id"], "type": "function", "function": {k: c["function"][k] for k in ("name", "arguments")}}
            for c in calls
        ]
    if message["role"] == "assistant" and message.get("weight") == 0:  # OpenAI's mark of a turn that is not learned
        kept["weight"] = 0
    return kept | ({"tool_call_id": message["tool_call_id"]} if message["role"] == "tool" else {})
