"""A model's chat template for conversations: messages -> parts of token ids, of which each answer is one.

The ids of a conversation up to an assistant's turn are the first ids of the same conversation with more turns, so that
what is served is what was trained, turn by turn. A chat template for which that does not hold is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pi_ray.conversation.messages import content_text, read_arguments
from pi_ray.conversation.tool_calls import parse_turn, render_turn
from pi_ray.conversation.tools import split_tools
from pi_ray.errors import ModelError

# ChatML, whose answers end with the tokenizer's own end of sequence: <|im_end|> where the model was trained on ChatML.
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BREAK = "\ufdd0"  # no character: it splits special tokens that a user spells out, until they can be read as text
MARK = "\ufdd1"  # no character either: it stands for the first message's text
CURE = "set prompt.chat to 'chatml'"
PROBE_TOOL: dict[str, Any] = {"type": "function", "function": {
    "name": "probe_tool", "description": "Probes.",
    "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "A key."}}},
}}
PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": MARK},
    {"role": "assistant", "content": "", "tool_calls": [{
        "id": "callprobe", "type": "function", "function": {"name": "probe_tool", "arguments": '{"key": "probe_key"}'},
    }]},
    {"role": "tool", "tool_call_id": "callprobe", "content": "probe_result"},
    {"role": "assistant", "content": "probe_answer"},
    {"role": "user", "content": "probe_question"},
    {"role": "assistant", "content": "probe_end"},
]


class Part(NamedTuple):
    """A piece of a conversation's ids: an assistant's turn with its end of sequence, or what stands between them."""

    ids: list[int]
    is_answer: bool


class ChatTemplate:
    """Conversations in a tokenizer's own chat template, or ChatML where `chat` says so. `encode` takes plain text.

    Tools, tool calls and results are the template's where it has them, else text (tools.py, tool_calls.py). Raises
    ModelError for a chat template that is unfit.
    """

    def __init__(self, tokenizer: Any, chat: str, encode: Callable[[str], list[int]]):
        if chat == "none":
            raise ModelError(f"prompt.chat none has no roles, by which turns of a conversation are told apart; {CURE}")
        self.tokenizer, self.encode, self.template = tokenizer, encode, CHATML_TEMPLATE if chat == "chatml" else None
        tokens = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: -len(item[1].content))
        special, space = {i: token for i, token in tokens if token.special}, r"\s*"
        self._ids = {token.content: i for i, token in special.items()}
        patterns = [f"{space * t.lstrip}({re.escape(t.content)}){space * t.rstrip}" for t in special.values()]
        self._special = re.compile("|".join(patterns) or r"(?!)")
        self._marks = re.compile("|".join(map(re.escape, self._ids)) or r"(?!)")
        self.has_tools = self._takes_tools()
        self.generation_prompt = self._find_generation_prompt()
        self._marks = re.compile("|".join(map(re.escape, [*self._ids, self.generation_prompt.strip()])))
        self.head = self._render(PROBE[:1]).partition(MARK)[0]
        self._check()

    def prefix(self, template: str) -> str:
        """The text before the first user's: chat head, and system message and tools of `template`."""
        template = template.replace(MARK, "")
        system, tools = split_tools(template) if self.has_tools else (template, [])
        head, found, _ = self._render([*_system(system), *PROBE[:1]], tools).partition(MARK)
        if not found:
            raise ModelError(f"the chat template leaves out the first message of a conversation; {CURE}")
        return head

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[Part]:
        """A conversation that ends with a user's message or a tool's result, from the first user's text to the head of
        the answer.
        """
        return self._parts(messages)

    def turns(self, messages: Sequence[dict[str, Any]]) -> list[Part]:
        """A conversation that ends with an assistant's turn. Raises ModelError where what stands before one of its
        turns is not what a request for that turn would send.
        """
        whole = self._row_text(_closed(messages))
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and not whole.startswith(self._row_text(messages[:i])):
                raise ModelError(
                    "the chat template changes earlier turns of a conversation once others follow (such as reasoning "
                    f"that it drops), so that answers would not be served as they are trained; {CURE}"
                )
        return self._parts(_closed(messages))[:-1]

    def answer(self, turn: str) -> list[int]:
        """Ids of an assistant's turn, which has tool calls as text, with its end of sequence."""
        return self._parts(_closed([*PROBE[:1], parse_turn(turn)]))[1].ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of the chat template's text, with its special tokens."""
        ids, at = list[int](), 0
        for found in self._special.finditer(text):
            ids += self._encode_plain(text[at : found.start()])
            ids.append(self._ids[next(filter(None, found.groups()))])
            at = found.end()
        return ids + self._encode_plain(text[at:])

    def _encode_plain(self, text: str) -> list[int]:
        text = text.replace(BREAK, "")
        return self.encode(text) if text else []

    def _row_text(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a row after the chat head, up to and with the head of an answer."""
        text = self._render(messages, generates=True)
        if not text.startswith(self.head):
            raise ModelError(f"the chat template begins a conversation in more than one way; {CURE}")
        return text[len(self.head) :]

    def _parts(self, messages: Sequence[dict[str, Any]]) -> list[Part]:
        """The parts of a row in turn: the text before the first answer, that answer, the text before the second, ..."""
        first, *following, last = self._row_text(messages).split(self.generation_prompt)
        turns = [message for message in messages if message["role"] == "assistant"]
        if last or len(following) != len(turns):
            raise ModelError(f"the chat template begins an assistant's turn otherwise than a request's answer; {CURE}")
        parts = [Part(self.encode_text(first + self.generation_prompt), False)]
        for turn, text in zip(turns, following, strict=True):
            answer, end, rest = text.partition(self.tokenizer.eos_token)
            if not end:
                raise ModelError(f"the chat template does not end an assistant's turn with {self.tokenizer.eos_token}, "
                                 f"by which pi-ray knows where an answer ends; {CURE}")
            if content_text(turn.get("content")).replace(BREAK, "").strip() not in answer.replace(BREAK, ""):
                raise ModelError("the chat template leaves out a part of an assistant's turn, such as reasoning or "
                                 f"text beside a tool call; {CURE}")
            parts.append(Part(self.encode_text(answer + end), True))
            parts.append(Part(self.encode_text(rest + self.generation_prompt), False))
        return parts

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), generates: bool = False
    ) -> str:
        """The text of messages. Special tokens in it are the template's own: those of users are split by BREAK."""
        from jinja2 import TemplateError

        made = list(_native_messages(messages) if self.has_tools else _text_messages(messages))
        try:
            return self.tokenizer.apply_chat_template(
                self._split_special(made), tools=self._split_special(list(tools)) or None, tokenize=False,
                add_generation_prompt=generates, chat_template=self.template,
            )
        except (TemplateError, TypeError, ValueError) as error:  # TypeError: a template that adds None to text
            raise ModelError(f"the chat template does not take this conversation ({error}); {CURE}") from error

    def _split_special(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marks.sub(lambda found: found[0][0] + BREAK + found[0][1:], value.replace(BREAK, ""))
        if isinstance(value, dict):
            return {self._split_special(k): self._split_special(v) for k, v in value.items()}
        return [self._split_special(item) for item in value] if isinstance(value, list) else value

    def _takes_tools(self) -> bool:
        """Whether the chat template writes tools, calls and results."""
        self.has_tools = True
        try:
            text = self._render(PROBE[:4], [PROBE_TOOL])
        except ModelError:
            return False
        return text.count("probe_tool") > 1 and "probe_key" in text and "probe_result" in text

    def _find_generation_prompt(self) -> str:
        """The head of an answer, by which answers are found in the text of a conversation."""
        without, head = (self._render(PROBE[:1], generates=generates) for generates in (False, True))
        found = head.removeprefix(without)
        if not head.startswith(without) or not found.strip():
            raise ModelError(f"the chat template marks no beginning of an answer; {CURE}")
        return found

    def _check(self) -> None:
        """Raise ModelError unless turns, their ends and what stands before them are found in the probe as they must be.
        """
        self.turns(PROBE)
        tools, closed = [PROBE_TOOL] if self.has_tools else [], _closed(PROBE)
        whole = self._render([*_system("probe_system"), *closed], tools, generates=True)
        if "probe_system" not in whole or whole.partition(MARK)[2] != self._row_text(closed).partition(MARK)[2]:
            raise ModelError("the chat template writes system message or tools behind the first user's text, or "
                             f"changes turns by them; {CURE}")


def _closed(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation that ends with an assistant's turn, and what a request for a further one would have after it."""
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "-"} for call in messages[-1].get("tool_calls") or ()
    ]
    return [*messages, *(results or [{"role": "user", "content": "-"}])]


def _system(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}] if text else []


def _native_messages(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Messages as chat templates with tools take them: arguments as an object, results named, in the calls' order."""
    made, names = list[dict[str, Any]](), dict[str, str]()
    for message in _in_order(messages):
        text = content_text(message.get("content"))
        if calls := message.get("tool_calls"):
            functions = [{**c["function"], "arguments": read_arguments(c["function"]["arguments"])} for c in calls]
            names = {c["id"]: c["function"]["name"] for c in calls}
            ids = [{"id": c["id"], "type": "function", "function": f} for c, f in zip(calls, functions, strict=True)]
            made.append({"role": "assistant", "content": text, "tool_calls": ids})
        elif message["role"] == "tool":
            call = message["tool_call_id"]
            made.append({"role": "tool", "tool_call_id": call, "name": names[call], "content": text})
        else:
            made.append({"role": message["role"], "content": text})
    return made


def _text_messages(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Messages with calls and results as text; the results of one turn are one user's message, as Qwen has them."""
    made, before = list[dict[str, Any]](), ""
    for message in _in_order(messages):
        role, text = message["role"], content_text(message.get("content"))
        if role == "tool":
            result = f"<tool_response>\n{text}\n</tool_response>"
            if before == "tool":
                made[-1]["content"] += f"\n{result}"
            else:
                made.append({"role": "user", "content": result})
        else:
            made.append({"role": role, "content": render_turn(message) if role == "assistant" else text})
        before = role
    return made


def _in_order(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the results of parallel calls in the order of their calls."""
    ordered, place = list[dict[str, Any]](), dict[str, int]()
    for message in messages:
        if message["role"] == "assistant":
            place = {call["id"]: i for i, call in enumerate(message.get("tool_calls") or ())}
        at = len(ordered)
        if message["role"] == "tool":
            while at and ordered[at - 1]["role"] == "tool" and (
                place[ordered[at - 1]["tool_call_id"]] > place[message["tool_call_id"]]
            ):
                at -= 1
        ordered.insert(at, message)
    return ordered
