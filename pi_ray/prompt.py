"""The prompt and its parts: x = (template, examples, query), paper section 3.

Text becomes token ids here and nowhere else: preparation, evaluation and serving all call `PromptEncoder`, so that the
ids sent at inference are the ids trained on. A prompt has two parts: `prefix` (chat head + template, equal for all rows
of a phase, so it can be computed once) and `row` (examples + query + chat tail).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.conversation import check_tools, join_tools, load_messages, parse_turn
from pi_ray.conversation.chat_template import ChatTemplate
from pi_ray.errors import DataError, ModelError

if TYPE_CHECKING:
    from pi_ray.config import PromptConfig

FENCE = r"[ \t]*(?:`{3,}|~{3,})[^`\n]*"  # a line of Markdown that opens or closes a block of code
CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
# Words of a chat template that only mark roles and turns.
ROLE_WORDS = {
    "user", "assistant", "model", "human", "system", "inst", "s", "bos", "begin", "of", "turn", "start", "end",
}  # fmt: skip


@dataclass(frozen=True)
class Template:
    """The recurrent part of a prompt: an instruction, documents (paper 4.1) and tools, compressed separately."""

    instruction: str
    documents: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()  # OpenAI tool definitions, each as JSON
    tool_uses: tuple[int, ...] = ()  # how often the training rows call each of them; () where nobody counted

    @property
    def text(self) -> str:
        written = "\n\n".join(part for part in (self.instruction, *self.documents) if part)
        return join_tools(written, [json.loads(tool) for tool in self.tools])

    @classmethod
    def parse(cls, markdown: str) -> Template:
        """Read template.md: the instruction, then documents that each begin at a `## ` heading, outside fenced code.

        The lines `# Instruction` and `# Documents` are optional and never sent; with more words they are text. With
        `# Documents`, only headings below it begin documents, so that an instruction can have its own. HTML comments
        are dropped.
        """
        text = re.sub(r"<!--.*?-->\n?", "", markdown, flags=re.S).strip()
        instruction, *below = re.split(r"^# Documents:?[ \t]*$", text, maxsplit=1, flags=re.M)
        if below:
            sections = split_sections(below[0])
        else:
            instruction, *sections = split_sections(text)
        instruction = re.sub(r"\A# Instructions?:?[ \t]*(\n|\Z)", "", instruction).strip()
        return cls(instruction, tuple(filter(None, map(str.strip, sections))))

    @classmethod
    def load(cls, path: Path, may_be_empty: bool = False) -> Template:
        """Read a template file. Raises DataError if it is missing, not UTF-8, or empty and may not be."""
        try:
            template = cls.parse(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise DataError(f"{path}: no such template file; `task.template` names it") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error})") from None
        if not template.text and not may_be_empty:
            raise DataError(f"{path}: the template is empty; write the instruction, then documents under `## ` lines")
        return template


def load_tools(path: Path) -> tuple[str, ...]:
    """Tool definitions, each as JSON. Raises DataError for a file that is missing or holds none."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8-sig"))
        check_tools(tools)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; task.tools names the JSON list of tool definitions") from None
    except (ValueError, RecursionError) as error:  # ValueError: also where it is not UTF-8, or not JSON
        raise DataError(f"{path}: no list of OpenAI tool definitions ({error})") from None
    return tuple(json.dumps(tool, ensure_ascii=False) for tool in tools)


def split_sections(text: str) -> list[str]:
    """The text before the first `## ` line, then one part for each such line outside fenced code.

    Every line of a part ends with a line break.
    """
    parts, fenced = [""], False
    for line in text.split("\n"):
        fenced ^= bool(re.match(rf"{FENCE}$", line))
        if line.startswith("## ") and not fenced:
            parts.append("")
        parts[-1] += line + "\n"
    return parts


@dataclass(frozen=True)
class Example:
    """One few-shot demonstration (x_j, y_j) of paper equation 3."""

    query: str
    answer: str


def render_prompt(
    config: PromptConfig, query: str, template: str = "", shots: Sequence[Example] = (), documents: Sequence[str] = ()
) -> str:
    """A whole prompt as text, for a model behind an API: what PromptEncoder puts between chat head and tail."""
    return (template + "\n\n" if template else "") + _render_row(config, query, shots, documents)


def _render_row(config: PromptConfig, query: str, shots: Sequence[Example], documents: Sequence[str]) -> str:
    """The text after the template: the row's own documents, examples, query."""
    return "\n\n".join([*documents, *_render_examples(config, shots), config.query.replace("{query}", query)])


def template_with_examples(config: PromptConfig, template: str, shots: Sequence[Example]) -> str:
    """The template with examples behind it that are the same for every query, as a server can send them."""
    return "\n\n".join(filter(None, [template, *_render_examples(config, shots)]))


def _render_examples(config: PromptConfig, shots: Sequence[Example]) -> list[str]:
    examples = [format_example(config.example, s.query, s.answer) for s in shots]
    return [config.examples_heading, *examples] if shots and config.examples_heading else examples


def format_example(wording: str, query: str, answer: str) -> str:
    """An example as prompt.example words it, in one pass: a client's query may spell out {answer} a thousand times."""
    return re.sub(r"\{(query|answer)\}", lambda found: query if found[1] == "query" else answer, wording)


_tokenizer_lock = threading.Lock()  # a call sets split_special_tokens on the tokenizer, which a server's threads share


def content_ids(tokenizer: Any, text: str, is_frame: bool = False) -> list[int]:
    """Token ids of a user's text, or of the chat template's (`is_frame`).

    Special tokens spelled out in a user's text stay text, so no query can end its own turn.
    """
    with _tokenizer_lock:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=not is_frame).input_ids


class PromptEncoder:
    """Text -> token ids for one tokenizer and one prompt format.

    With `prompt.conversation` a query is a conversation (`dump_messages`, or plain text for one user's message), an
    answer an assistant's turn, and the template its system message and tools. Raises ModelError if the tokenizer has no
    end-of-sequence token or its chat template is unfit, such as one that adds a system prompt.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig):
        self.tokenizer, self.config = tokenizer, config
        self.head, self.tail = _chat_frame(tokenizer, config.chat)
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token, by which pi-ray knows where an answer ends")
        with _tokenizer_lock:
            empty = tokenizer("").input_ids
        bos = tokenizer.bos_token_id
        self.tail_ids = self._frame(self.tail)
        self.bos = [bos] if bos in empty and not (self.head and self.head.startswith(tokenizer.bos_token)) else []
        self.chat = ChatTemplate(tokenizer, config.chat, self._content) if config.conversation else None

    def prefix(self, template: str) -> list[int]:
        """Chat head and template text; the head alone when the template is internalised (rate 0)."""
        if self.chat:
            head = self.chat.prefix(template)
            begun = self.bos and head.startswith(self.tokenizer.bos_token)
            return [*([] if begun else self.bos), *self.chat.encode_text(head)]
        return self.bos + self._frame(self.head) + (self._content(template + "\n\n") if template else [])

    def row(self, query: str, shots: Sequence[Example] = (), documents: Sequence[str] = ()) -> list[int]:
        """The row's own documents, examples with the least similar first, query next to the best one, chat tail."""
        if self.chat:
            return [i for part in self.chat.prompt(load_messages(query)) for i in part.ids]
        return self._content(_render_row(self.config, query, shots, documents)) + self.tail_ids

    def fitted_row(
        self, query: str, shots: Sequence[Example], documents: Sequence[str], room: int
    ) -> tuple[list[int], int]:
        """(the row's ids with as many of its examples as `room` tokens hold, how many are left out), the least similar
        first. Without any it may still be longer.
        """
        for left_out in range(len(shots) + 1):
            ids = self.row(query, shots[left_out:], documents)
            if len(ids) <= room:
                break
        return ids, left_out

    def encode(
        self, query: str, template: str = "", shots: Sequence[Example] = (), documents: Sequence[str] = ()
    ) -> list[int]:
        """A whole prompt."""
        return self.prefix(template) + self.row(query, shots, documents)

    def conversation(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of (role, text) messages in the model's own chat template, and of the head of the answer.

        For a base model and prompt.chat 'none'. Raises ModelError where there is no template that takes them.
        """
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ModelError("the base model has no chat template: send the query alone, as one message of role 'user'")
        marks = [f"\x02{i}\x03" for i in range(len(messages))]
        marked = [{"role": role, "content": mark} for mark, (role, _) in zip(marks, messages, strict=True)]
        try:
            rest = self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ModelError(f"the base model's chat template takes no such conversation: {error}") from error
        ids = [] if self.bos and rest.startswith(self.tokenizer.bos_token) else [*self.bos]
        for mark, (_, text) in zip(marks, messages, strict=True):
            frame, found, rest = rest.partition(mark)
            if not found:
                raise ModelError("the base model's chat template leaves out a part of this conversation")
            ids += self._frame(frame) + self._content(text)
        return ids + self._frame(rest)

    def answer(self, answer: str) -> list[int]:
        """The label ids: the answer and the end-of-sequence token."""
        if self.chat:
            return self.chat.answer(answer)
        return [*self._content(answer), self.tokenizer.eos_token_id]

    def all_turns(self, query: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids before a conversation's first learned turn, and from there to the end of its last one, `answer`. An
        assistant's turn is learned unless its weight is 0.

        An id of the second that no learned turn has is fed, not learned, and stands as its complement, -1 - id.
        """
        assert self.chat
        turns, ids = [*load_messages(query), parse_turn(answer)], list[int]()
        weights = iter([turn.get("weight", 1) for turn in turns if turn["role"] == "assistant"])
        for part in self.chat.turns(turns):
            ids += part.ids if part.is_answer and next(weights) else [~i for i in part.ids]
        begin = next(place for place, i in enumerate(ids) if i >= 0)
        return [~i for i in ids[:begin]], ids[begin:]

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids -> text, up to the first end-of-sequence token."""
        ids = list(ids)
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _frame(self, text: str) -> list[int]:
        return content_ids(self.tokenizer, text, is_frame=True) if text else []

    def _content(self, text: str) -> list[int]:
        return content_ids(self.tokenizer, text)


def _chat_frame(tokenizer: Any, chat: str) -> tuple[str, str]:
    """The chat head and tail: the text before and after a user's words."""
    if chat == "none":
        return "", "\n"
    if chat == "chatml":
        return CHATML
    if not tokenizer.chat_template:
        raise ModelError(
            f"prompt.chat is '{chat}', but this model has no chat template; set prompt.chat to 'none' or 'chatml'"
        )
    mark = "\x02QUERY\x03"  # \x1f would count as white space, which templates trim
    message = {"role": "user", "content": mark}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    head, found, tail = text.partition(mark)
    if not found:
        raise ModelError("the chat template does not keep the user's words; set prompt.chat to 'none' or 'chatml'")
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"<[^>]*>|\[/?[A-Z_]+\]", " ", head))
    injected = [w for w in words if w.lower() not in ROLE_WORDS]
    if injected and chat != "model+system":
        raise ModelError(
            f"the model's chat template adds a system prompt of its own ({' '.join(injected[:12])!r}...), which would "
            "be sent and paid for with every query; set prompt.chat to 'chatml' to leave it out, or to 'model+system' "
            "to keep it"
        )
    return head, tail
