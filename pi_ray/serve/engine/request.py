"""A request for one answer, whichever endpoint it came to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pi_ray.conversation import content_text, join_tools
from pi_ray.serve.engine.grammar import FREE_ANSWER, AnswerFormat

Message = dict[str, Any]  # OpenAI's, of role system, user, assistant or tool


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request for one answer. Its conversation is `history`, then the user's `query`, unless there are
    `messages`, which may have tool calls and results.
    """

    model: str
    query: str
    max_tokens: int | None = None  # None: twice the longest answer that the adapter was trained on
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()  # (role, text) of the messages before the query: system, user, assistant
    logprobs: int | None = None  # likeliest tokens to report beside each one; None: no log-probabilities
    choices: int = 1  # answers that share the server's token limit
    copies: int = 1  # of which so many are to this prompt
    sticky_key: str = ""  # requests with the same key meet the same version while a canary is out
    cache_salt: str = ""  # requests of different salts share no cached prefix
    base_allowed: bool = True  # whether the base model may answer in the adapter's place, where the prompt has changed
    full_prompt: bool = False  # for comparison: the base model answers, with the adapter's whole template
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()  # OpenAI tool definitions
    answer: AnswerFormat = FREE_ANSWER

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in self.messages)

    @property
    def full_text(self) -> str:
        """All text that the client sent."""
        if not self.uses_tools:
            return "\n\n".join(text for text in (*(text for _, text in self.history), self.query) if text)
        return join_tools("", self.tools) + json.dumps(self.messages, ensure_ascii=False)

    def split_conversation(self) -> tuple[str, list[Message]]:
        """The text of the system messages, and the other messages. Raises ValueError where one is behind these."""
        texts = [{"role": role, "content": text} for role, text in (*self.history, ("user", self.query))]
        messages: Sequence[Message] = self.messages or texts
        is_system = [m["role"] == "system" for m in messages]
        if is_system != sorted(is_system, reverse=True):
            raise ValueError("roles out of order: a system message can only stand before all messages of other roles")
        system = "\n\n".join(content_text(m.get("content")) for m in messages if m["role"] == "system")
        return system, [m for m in messages if m["role"] != "system"]

    def for_choices(self, n: int) -> list[Self]:
        """The request for each of `n` answers to this prompt. A seed gives each one its own, so that they differ."""
        if self.seed is None:
            return [replace(self, copies=n)] * n
        return [replace(self, copies=n, seed=(self.seed + i + 2**63) % 2**64 - 2**63) for i in range(n)]
