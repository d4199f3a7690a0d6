"""Conversations with the base model in its own chat template. An adapter, trained on the query alone, reads none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from pi_ray.config import PromptConfig
from pi_ray.errors import ModelError
from pi_ray.prompt import PromptEncoder


class ConversationEncoder(PromptEncoder):
    """Messages -> ids. Raises ModelError where the model has no chat template, or one that does not take them."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, PromptConfig(chat="none"))  # the frame is that of each conversation
        if not tokenizer.chat_template:
            raise ModelError("the base model has no chat template: send the query alone, as one message of role 'user'")

    def encode_conversation(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of (role, text) messages and the head of the answer. Special tokens in a message stay text."""
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
