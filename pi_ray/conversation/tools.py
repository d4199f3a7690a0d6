"""Tool definitions: what is taken, and the text that stands for them where a chat template has none of its own."""

import json
from collections.abc import Sequence
from typing import Any

from pi_ray.conversation.messages import check_json, encode_json

MAX_TOOLS = 512
# The words of Qwen 2.5's chat template, whose models and Hermes' know them.
BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def check_tools(tools: Any) -> None:
    """Raise ValueError, with the reason in a sentence, unless `tools` is a list of OpenAI tool definitions."""
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise ValueError(f"tools must be a list of at most {MAX_TOOLS} tool definitions")
    names = set[str]()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name.strip():
            raise ValueError(f'tools[{i}] must be {{"type": "function", "function": {{"name": ...}}}}')
        if name in names:
            raise ValueError(f"tools[{i}]: there is a function '{name}' already")
        if not isinstance(function.get("parameters", {}), dict):
            raise ValueError(f"tools[{i}].function.parameters must be a JSON schema, an object")
        check_json(tool, f"tools[{i}]")
        names.add(name)


def join_tools(system: str, tools: Sequence[dict[str, Any]]) -> str:
    """System message and tools as one text, each definition as JSON on a line of its own; `system` without tools."""
    if not tools:
        return system
    lines = "\n".join(map(encode_json, tools))
    return "\n\n".join(filter(None, [system, BEFORE + lines + AFTER]))


def split_tools(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The system message and the tools of a text that `join_tools` made; any other text has no tools."""
    begin = 0 if text.startswith(BEFORE) else text.find(f"\n\n{BEFORE}")
    if begin < 0 or not text.endswith(AFTER):
        return text, []
    try:
        lines = text[begin:].lstrip("\n").removeprefix(BEFORE).removesuffix(AFTER)
        tools = [json.loads(line) for line in lines.split("\n")]
        check_tools(tools)
    except (ValueError, RecursionError):
        return text, []
    return text[:begin], tools
