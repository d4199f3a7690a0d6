"""A user's own conversations, in OpenAI's messages: of any number of turns, with tool calls and their results.

A line is {"messages": [...]}, and if wanted "id" and "group"; the system message and the tools that every conversation
has stand in template.md and tools.json (`task.tools`). A row that repeats them is spared of them; one with others is
rejected. Comments and .json arrays are as in jsonl.py.

A training row is a conversation up to its last assistant turn. A dev or test row is one assistant turn: each of a
conversation, or its last (`task.learn`). The row's query is the conversation before the turn, its answer the turn as
text, which may be tool calls.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pi_ray.conversation import (
    check_messages,
    content_text,
    dump_messages,
    load_messages,
    parse_turn,
    render_turn,
)
from pi_ray.prompt import Template, load_tools
from pi_ray.protocols import SPLITS, UNLABELLED, Reject, Row
from pi_ray.tasks.dataset import fingerprint_files
from pi_ray.tasks.jsonl import JsonlTask, parse_line, read_contents

CALL, REPLY = "tool call", "reply"  # groups of test rows
TURN = "#"  # between the id of a conversation and the number of one of its turns


def conversation_of(row_id: str) -> str:
    """The conversation of a row: its id, without the number of a turn."""
    return re.sub(rf"{TURN}\d+$", "", row_id)


class ConversationsTask(JsonlTask):
    """Conversations from `task.train`, `task.dev`, `task.test`; scored by `task.metric`."""

    def template(self) -> Template:
        written = self.written
        return Template(written.instruction, written.documents, self.tools, self.tool_uses)

    @cached_property
    def written(self) -> Template:
        """The template without its tools. Beside these there may be no system message."""
        return Template.load(Path(self.config.template), may_be_empty=bool(self.tools))

    @cached_property
    def tools(self) -> tuple[str, ...]:
        """Tool definitions, each as JSON. Raises DataError for a file that holds none."""
        return load_tools(Path(self.config.tools)) if self.config.tools else ()

    @cached_property
    def tool_uses(self) -> tuple[int, ...]:
        """How often training rows call each tool."""
        uses: Counter[str] = Counter()
        for row in self.rows("train") if self.tools else ():
            if isinstance(row, Row):
                turns = [*load_messages(row.query), parse_turn(row.answer)]
                uses.update(call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ()))
        return tuple(uses[json.loads(tool)["function"]["name"]] for tool in self.tools)

    @cached_property
    def system(self) -> str:
        """The recurrent system message, with its white space collapsed."""
        return " ".join(self.written.text.split())

    def score_all(self, rows: Sequence[Row], outputs: Sequence[str]) -> list[dict[str, float]]:
        """The turns that the outputs are, against the rows': white space within tool calls does not count."""
        turns = [o if o == row.answer else _rewrite_turn(o) for row, o in zip(rows, outputs, strict=True)]
        return super().score_all(rows, turns)

    def fingerprint(self) -> str:
        paths = [Path(getattr(self.config, name)) for name in (*SPLITS, "queries", "template", "tools")]
        return fingerprint_files(self.config, paths)

    def read_file(self, path: Path, split: str) -> Iterator[Row | Reject]:
        """The rows of one file. Ids of conversations must differ within it."""
        seen: set[str] = set()
        for number, content in read_contents(path):
            try:
                data = parse_line(content) if isinstance(content, bytes) else content
                name, messages = self._conversation(data, f"{split}-{number}")
                rows = list(self._rows(name, messages, split, data.get("group") or ""))
                if name in seen:
                    raise ValueError(f"duplicate id '{name}'")
                seen.add(name)
            except ValueError as reason:
                yield Reject(str(path), number, str(reason))
                continue
            yield from rows

    def _conversation(self, data: Any, default_id: str) -> tuple[str, list[dict[str, Any]]]:
        """The id and the messages of a line, without what recurs. Raises ValueError with what is wrong."""
        if not isinstance(data, dict) or not isinstance(messages := data.get("messages"), list):
            raise ValueError("missing field: a conversation is an object with 'messages', a list")
        name, group = data.get("id", default_id), data.get("group") or ""
        if isinstance(name, bool) or not isinstance(name, (str, int)) or not content_text(str(name), "id").strip():
            raise ValueError("wrong type: 'id' must be text or a whole number")
        if not isinstance(group, str):
            raise ValueError("wrong type: 'group' must be text")
        content_text(group, "group")
        if data.get("tools") and data["tools"] != [json.loads(tool) for tool in self.tools]:
            raise ValueError("its tools are not those of task.tools, which every conversation must share")
        messages = [{**m, "role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m
                    for m in messages]
        check_messages(messages)
        if messages[0]["role"] == "system":
            if " ".join(content_text(messages[0].get("content")).split()) != self.system:
                raise ValueError("its system message is not that of task.template, which every conversation must share")
            messages = messages[1:]
        if not messages:
            raise ValueError("the conversation has nothing but a system message")
        return str(name), messages

    def _rows(self, name: str, messages: list[dict[str, Any]], split: str, group: str) -> Iterator[Row]:
        """The rows of one conversation. Raises ValueError where no assistant turn could be learned."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
        if split == UNLABELLED:
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            yield Row(name, dump_messages(asked), "", group)
            return
        if not turns:
            raise ValueError("the conversation has no assistant turn to learn")
        one = split == "train" or self.config.learn == "last"
        for number, i in list(enumerate(turns, start=1))[-1 if one else 0 :]:
            kind, row_id = CALL if messages[i].get("tool_calls") else REPLY, name if one else f"{name}{TURN}{number}"
            yield Row(row_id, dump_messages(messages[:i]), render_turn(messages[i]), group or kind)


def _rewrite_turn(output: str) -> str:
    """A generated turn with its calls written as answers have them; as it is where it holds what no turn can."""
    try:
        return render_turn(parse_turn(output, bare=True))
    except ValueError:  # a NUL character
        return output
