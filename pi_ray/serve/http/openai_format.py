"""How an answer looks to the client: OpenAI's chat completion and its older plain completion, whole and in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Marks = Sequence[dict[str, Any]] | None  # text.Logprobs' entries; None: they were not asked for


class Chat:
    """How a chat completion looks."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str, marks: Marks) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": finish, **self._logprobs(marks)}

    def delta(self, index: int, text: str, finish: str | None = None, marks: Marks = None) -> dict[str, Any]:
        return {"index": index, "delta": {} if finish else {"content": text}, "finish_reason": finish, **self._logprobs(marks)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role comes once: clients join the pieces of every field."""
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def _logprobs(self, marks: Marks) -> dict[str, Any]:
        if marks is None:
            return {}
        content = [{**_seen(m), "top_logprobs": [_seen(t) for t in m["top"]]} for m in marks]
        return {"logprobs": {"content": content, "refusal": None}}


class Text:
    """How a plain completion looks."""

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish: str | None, marks: Marks) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": None if marks is None else self._logprobs(marks)}

    def delta(self, index: int, text: str, finish: str | None = None, marks: Marks = None) -> dict[str, Any]:
        return self.choice(index, text, finish, marks)

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def _logprobs(self, marks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The likeliest tokens as a mapping, the token itself always among them."""
        tops = [{t["token"]: t["logprob"] for t in [*m["top"], m]} for m in marks]
        return {
            "tokens": [m["token"] for m in marks], "token_logprobs": [m["logprob"] for m in marks],
            "top_logprobs": tops if any(m["top"] for m in marks) else None, "text_offset": [m["offset"] for m in marks],
        }  # fmt: skip


def _seen(mark: dict[str, Any]) -> dict[str, Any]:
    return {key: mark[key] for key in ("token", "bytes", "logprob")}
