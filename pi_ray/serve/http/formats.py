"""OpenAI's formats of responses, whole and in chunks."""

from collections.abc import Sequence
from typing import Any

Logprobs = Sequence[dict[str, Any]] | None  # entries of LogprobsBuffer; None: they were not asked for
ToolCalls = Sequence[dict[str, Any]]  # as OpenAI has them


class ChatFormat:
    """The responses of a chat completion: `choice` is an entry of a whole one, `delta` and `opening` of a chunk."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str, logprobs: Logprobs, calls: ToolCalls = ()) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message.update(content=text or None, tool_calls=list(calls))
        return {"index": index, "message": message, "finish_reason": finish, **self._logprobs(logprobs)}

    def delta(self, index: int, text: str, finish: str | None = None, logprobs: Logprobs = None) -> dict[str, Any]:
        content = {} if finish else {"content": text}
        return {"index": index, "delta": content, "finish_reason": finish, **self._logprobs(logprobs)}

    def call_deltas(self, index: int, place: int, call: dict[str, Any]) -> list[dict[str, Any]]:
        """The `place`-th call of an answer, as clients join it: its name first, then its arguments."""
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        head = {"index": place, "id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        parts = [head, {"index": place, "function": {"arguments": arguments}}]
        return [{"index": index, "delta": {"tool_calls": [part]}, "finish_reason": None} for part in parts]

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role is sent once: clients join the chunks of every field."""
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def _logprobs(self, entries: Logprobs) -> dict[str, Any]:
        if entries is None:
            return {}
        content = [{**_token(e), "top_logprobs": [_token(top) for top in e["top"]]} for e in entries]
        return {"logprobs": {"content": content, "refusal": None}}


class CompletionFormat:
    """The responses of a plain completion, OpenAI's older endpoint."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def choice(
        self, index: int, text: str, finish: str | None = None, logprobs: Logprobs = None, calls: ToolCalls = ()
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": self._logprobs(logprobs)}

    delta = choice  # a chunk has the same shape

    def call_deltas(self, index: int, place: int, call: dict[str, Any]) -> list[dict[str, Any]]:
        return []  # here calls are text

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def _logprobs(self, entries: Logprobs) -> dict[str, Any] | None:
        """The likeliest tokens as a mapping, the token itself always among them."""
        if entries is None:
            return None
        tops = [{top["token"]: top["logprob"] for top in [*e["top"], e]} for e in entries]
        return {
            "tokens": [e["token"] for e in entries], "token_logprobs": [e["logprob"] for e in entries],
            "top_logprobs": tops if any(e["top"] for e in entries) else None,
            "text_offset": [e["offset"] for e in entries],
        }


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("token", "bytes", "logprob")}
