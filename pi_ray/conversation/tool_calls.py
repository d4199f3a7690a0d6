"""Tool calls as text, in the form of Nous Research's Hermes models, which Qwen's models took over.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

An assistant's turn as text is its content, then its calls. Answers of rows, generated answers and metrics have it.
"""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from pi_ray.conversation.messages import content_text, read_arguments

START, END = "<tool_call>", "</tool_call>"
_DECODER = json.JSONDecoder()
_WHITE_SPACE = re.compile(r"\s*")


def render_tool_calls(calls: Sequence[dict[str, Any]]) -> str:
    """OpenAI tool calls as text. Arguments are written anew, so that white space in them does not count."""
    return "\n".join(f"{START}\n{_call_json(call['function'])}\n{END}" for call in calls)


def _call_json(function: dict[str, Any]) -> str:
    arguments = read_arguments(function["arguments"])
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def parse_tool_calls(
    text: str, bare: bool = True, known: Collection[str] | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """Generated text -> (content, OpenAI tool calls), which have the ids call_0, call_1...

    What only resembles a call stays content, as does one of a function that is not `known` (None: all are). With
    `bare`, an answer that is nothing but JSON of one call, or of a list of them, with "arguments" or Llama's
    "parameters", is taken as well: some chat templates have calls without marks.
    """
    functions, content, at = list[dict[str, Any]](), "", 0
    while (start := text.find(START, at)) >= 0:
        found, end = read_call(text, start + len(START), known)
        end = end if found else start + len(START)
        content += text[at:start] if found else text[at:end]
        functions += [found] if found else []
        at = end
    content = (content + text[at:]).strip()
    if bare and not functions and content[:1] in ("{", "["):
        functions = _bare_calls(content, known)
        content = "" if functions else content
    named = [{"id": f"call_{i}", "type": "function", "function": function} for i, function in enumerate(functions)]
    return content, named


def read_call(text: str, at: int, known: Collection[str] | None = None) -> tuple[dict[str, Any] | None, int]:
    """The function that is called by the JSON at `at`, and where its end mark ends; (None, ...) for no whole call.

    JSON is read first, since an argument's text may hold the end mark.
    """
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, at))
    except (ValueError, RecursionError):
        return None, at
    end = _skip_space(text, end)
    return (_as_function(value, known) if text.startswith(END, end) else None), end + len(END)


def is_broken_call(text: str, at: int) -> bool:
    """Whether what `read_call` does not take at `at` is no call whatever may follow the text."""
    try:
        _, end = _DECODER.raw_decode(text, _skip_space(text, at))
    except json.JSONDecodeError as error:  # within a string, the end mark is text of an argument
        return error.pos < text.rfind(END) and not error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return True
    end = _skip_space(text, end)
    rest = text[end : end + len(END)]
    return rest == END or not END.startswith(rest)


def _skip_space(text: str, at: int) -> int:
    found = _WHITE_SPACE.match(text, at)
    return found.end() if found else at


def _bare_calls(text: str, known: Collection[str] | None) -> list[dict[str, Any]]:
    """The functions that JSON alone calls; none where it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found = [_as_function(item, known) for item in (value if isinstance(value, list) else [value])]
    return [function for function in found if function] if all(found) else []


def _as_function(value: Any, known: Collection[str] | None) -> dict[str, Any] | None:
    """{"name", "arguments": JSON text} of a call as JSON; None where it is none, or of a function that is not known."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    if known is not None and name not in known:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    written = json.dumps(arguments, ensure_ascii=False)
    try:
        content_text(name)
        read_arguments(written)
    except ValueError:
        return None
    return {"name": name, "arguments": written}


def render_turn(message: dict[str, Any]) -> str:
    """An assistant's turn as text: its content, then its tool calls."""
    text = content_text(message.get("content")).strip()
    return "\n".join(filter(None, [text, render_tool_calls(message.get("tool_calls") or ())]))


def parse_turn(text: str, bare: bool = False) -> dict[str, Any]:
    """The assistant's message of which `text` is the turn; `bare` as of parse_tool_calls, for a generated one."""
    content, calls = parse_tool_calls(text, bare)
    return {"role": "assistant", "content": content or None, **({"tool_calls": calls} if calls else {})}
