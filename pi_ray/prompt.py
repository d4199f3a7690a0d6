"""The prompt and its parts: x = (template, examples, query), paper section 3.

Text becomes token ids here and nowhere else: preparation, evaluation and serving all call `PromptEncoder`, so that the ids
sent at inference are the ids trained on. A prompt is two runs of ids: `prefix` (chat head + template, equal for all
rows of a phase, so it can be computed once) and `row` (examples + query + chat tail).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.errors import DataError, ModelError

if TYPE_CHECKING:
    from pi_ray.config import PromptConfig

CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
ROLE_WORDS = {"user", "assistant", "model", "human", "system", "inst", "s", "bos", "begin", "of", "turn", "start", "end"}


@dataclass(frozen=True)
class Template:
    """The recurrent part of a prompt: an instruction and documents (paper 4.1), compressed separately."""

    instruction: str
    documents: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "\n\n".join(part for part in (self.instruction, *self.documents) if part)

    @classmethod
    def parse(cls, markdown: str) -> Template:
        """Read template.md: text under `# Instruction`, then documents under `# Documents`, each starting at a `## ` heading.

        Without these headings everything is the instruction. HTML comments are notes to the author and are dropped.
        """
        text = re.sub(r"<!--.*?-->\n?", "", markdown, flags=re.S).strip()
        head, _, tail = text.partition("\n# Documents")
        instruction = re.sub(r"\A# Instruction[^\n]*\n", "", head).strip()
        documents = tuple(d.strip() for d in re.split(r"\n(?=## )", tail) if d.strip())
        return cls(instruction, documents)

    @classmethod
    def load(cls, path: Path) -> Template:
        try:
            template = cls.parse(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: no such template file; `task.template` names it") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error})") from None
        if not template.text:
            raise DataError(f"{path}: the template is empty; write the instruction under a line `# Instruction`")
        return template


@dataclass(frozen=True)
class Example:
    """One few-shot demonstration (x_j, y_j) of paper equation 3."""

    query: str
    answer: str


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt: `prefix` is shared by every row of a phase, `row` belongs to the row."""

    prefix: list[int]
    row: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prefix + self.row


def text_of(config: PromptConfig, query: str, template: str = "", shots: Sequence[Example] = (), documents: Sequence[str] = ()) -> str:
    """A whole prompt as text, for a model behind an API: the words that PromptEncoder puts between chat head and tail."""
    return (template + "\n\n" if template else "") + _body(config, query, shots, documents)


def _body(config: PromptConfig, query: str, shots: Sequence[Example], documents: Sequence[str]) -> str:
    """The row's own documents, examples, query."""
    rendered = [config.example.replace("{query}", s.query).replace("{answer}", s.answer) for s in shots]
    heading = [config.examples_heading] if shots and config.examples_heading else []
    return "\n\n".join([*documents, *heading, *rendered, config.query.replace("{query}", query)])


_tokenizing = threading.Lock()  # a call sets how the tokenizer treats special tokens, and a server's threads share one tokenizer


def content_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a user's text: a special token spelled out in it stays text, so that a query cannot end its own turn."""
    return _ids(tokenizer, text, split_special_tokens=True)


def _ids(tokenizer: Any, text: str, split_special_tokens: bool) -> list[int]:
    with _tokenizing:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens).input_ids


class PromptEncoder:
    """Text -> ids for one tokenizer and one prompt format. Raises ModelError when the chat template injects text of its own."""

    def __init__(self, tokenizer: Any, config: PromptConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.head, self.tail = _chat_frame(tokenizer, config.chat)
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token; pi-ray needs one to know where an answer ends")
        with _tokenizing:
            empty = tokenizer("").input_ids
        self.bos = [] if not empty or tokenizer.bos_token_id not in empty or (self.head and self.head.startswith(tokenizer.bos_token)) else [tokenizer.bos_token_id]

    def prefix(self, template: str) -> list[int]:
        """Chat head and template text; the head alone when the template is internalised (rate 0)."""
        return self.bos + self._frame(self.head) + (self._content(template + "\n\n") if template else [])

    def row(self, query: str, shots: Sequence[Example] = (), documents: Sequence[str] = ()) -> list[int]:
        """The row's own documents, examples (least similar first, so that the best one stands next to the query), query, chat tail."""
        return self._content(_body(self.config, query, shots, documents)) + self._frame(self.tail)

    def encode(self, query: str, template: str = "", shots: Sequence[Example] = (), documents: Sequence[str] = ()) -> Encoded:
        return Encoded(self.prefix(template), self.row(query, shots, documents))

    def answer(self, answer: str) -> list[int]:
        """The label ids: the answer and the end-of-sequence token."""
        return [*self._content(answer), self.tokenizer.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids -> text, up to the first end-of-sequence token."""
        ids = list(ids)
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _frame(self, text: str) -> list[int]:
        return _ids(self.tokenizer, text, split_special_tokens=False) if text else []

    def _content(self, text: str) -> list[int]:
        return content_ids(self.tokenizer, text)


def _chat_frame(tokenizer: Any, chat: str) -> tuple[str, str]:
    """The text before and after the user's words."""
    if chat == "none":
        return "", "\n"
    if chat == "chatml":
        return CHATML
    if not tokenizer.chat_template:
        raise ModelError(f"prompt.chat is '{chat}', but this model has no chat template; set prompt.chat to 'none' or 'chatml'")
    mark = "\x02QUERY\x03"  # no white space (as \x1f is), which templates trim
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
    head, found, tail = text.partition(mark)
    if not found:
        raise ModelError("the model's chat template does not keep the user's words; set prompt.chat to 'none' or 'chatml'")
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"<[^>]*>|\[/?[A-Z_]+\]", " ", head))
    injected = [w for w in words if w.lower() not in ROLE_WORDS]
    if injected and chat != "model+system":
        raise ModelError(
            f"the model's chat template adds a system prompt of its own ({' '.join(injected[:12])!r}...), which would be sent and paid for with every query; "
            "set prompt.chat to 'chatml' to leave it out, or to 'model+system' to keep it"
        )
    return head, tail
