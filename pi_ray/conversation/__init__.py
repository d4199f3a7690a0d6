"""Conversations: messages in OpenAI's form, checked; tool calls and tools as text, where a model has no form for them.

A conversation's recurrent part is its system message and its tools. As one text, the form in which templates are
compressed, stored and published, it is `join_tools(system, tools)`, and `split_tools` gives both back. An adapter that
was trained on conversations says so in pi_ray.json, under "prompt": {"conversation": true}. Its prompt.json has that
text as "template" (and in "compressed", at the rates of training), from which `split_tools` reads what a client sends.
"""

from pi_ray.conversation.messages import (
    MAX_MESSAGES,
    check_messages,
    content_text,
    dump_messages,
    last_messages,
    load_messages,
)
from pi_ray.conversation.tool_calls import parse_tool_calls, parse_turn, render_tool_calls, render_turn
from pi_ray.conversation.tools import check_tools, join_tools, split_tools

__all__ = [
    "MAX_MESSAGES", "check_messages", "check_tools", "content_text", "dump_messages", "join_tools", "last_messages",
    "load_messages", "parse_tool_calls", "parse_turn", "render_tool_calls", "render_turn", "split_tools",
]
