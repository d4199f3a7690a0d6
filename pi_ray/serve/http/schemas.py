"""OpenAI's schemas: request bodies, validated before anything else happens, and responses, whole and in chunks."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, Field, ValidationError

from pi_ray.serve.engine.completion import CompletionRequest
from pi_ray.serve.engine.refusal import RefusedError

History = tuple[tuple[str, str], ...]  # (role, text) of the messages before the query
Logprobs = Sequence[dict[str, Any]] | None  # entries of LogprobsBuffer; None: they were not asked for
MAX_CHOICES = 16
BODY_TIMEOUT_S = 30.0
MAX_MESSAGES = 256  # of a conversation, and of the parts of a message: each one costs time, however short it is
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the answer and are not supported -> values that change nothing and are let through. Other
# unknown fields are ignored.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "echo": (False,), "suffix": ("",),
    # other servers' own
    "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: str
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    include_usage: bool = False


class PiRayFields(BaseModel, extra="forbid"):
    """Fields that OpenAI's API does not have."""

    full_prompt: bool = False  # for comparison: the base model answers, with the adapter's whole template


class RequestBody(BaseModel, extra="allow"):
    """The fields that both endpoints share. Greedy unless a temperature is given."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    user: str | None = None
    pi_ray: PiRayFields | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def _requests(
        self, prompts: list[tuple[History, str]], logprobs: int | None, request_id: str, capacity: int
    ) -> list[CompletionRequest]:
        """One for each choice, choices of one prompt in a row. Raises RefusedError for more than `capacity` at once."""
        for field, neutral in UNSUPPORTED_FIELDS.items():
            value = (self.model_extra or {}).get(field)
            if value is not None and value not in neutral:
                raise _unsupported(field)
        total, limit = len(prompts) * self.choices, min(capacity, MAX_CHOICES)
        if total > limit:
            raise RefusedError(400, f"at most {limit} answers at once: prompts times n is {total}", param="n")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 4 or not all(0 < len(s) <= 100 for s in stop):
            raise RefusedError(400, "stop takes up to 4 strings of 1 to 100 characters", param="stop")
        requests = [
            CompletionRequest(
                self.model, query, self.max_completion_tokens or self.max_tokens, self.temperature or 0.0,
                1.0 if self.top_p is None else self.top_p, self.seed, tuple(stop), history, logprobs, choices=total,
                sticky_key=self.user or request_id, full_prompt=bool(self.pi_ray and self.pi_ray.full_prompt),
            )
            for history, query in prompts
        ]
        return [choice for request in requests for choice in request.for_choices(self.choices)]


class ChatBody(RequestBody):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def completion_requests(self, request_id: str, capacity: int) -> list[CompletionRequest]:
        """The last message is the query; an old client may still send template and examples in those before it."""
        *history, last = self.messages
        if last.role != "user" or any(m.role not in ROLES for m in history):
            allowed = "role 'user', and those before it of role 'system', 'user' or 'assistant'"
            raise RefusedError(400, f"the last message must be of {allowed}", param="messages")
        if self.top_logprobs and not self.logprobs:
            raise RefusedError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        prompt = tuple((ROLES[m.role], m.text) for m in history), last.text
        return self._requests([prompt], (self.top_logprobs or 0) if self.logprobs else None, request_id, capacity)


class CompletionBody(RequestBody):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    def completion_requests(self, request_id: str, capacity: int) -> list[CompletionRequest]:
        if self.best_of and self.best_of != self.choices:
            raise _unsupported("best_of")
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return self._requests([((), prompt) for prompt in prompts], self.logprobs, request_id, capacity)


Body = TypeVar("Body", bound=RequestBody)


def _unsupported(field: str) -> RefusedError:
    return RefusedError(400, f"{field} is not supported here; leave it out", code="unsupported_parameter", param=field)


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """The parsed body. Raises RefusedError: 413 before more than `limit` bytes are read, 408, 400 for a wrong one."""
    too_large = RefusedError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT_S} s"
        raise RefusedError(408, message, "timeout_error", "body_timeout") from None
    try:
        return kind.model_validate_json(bytes(data))  # refuses a lone surrogate as well, which has no UTF-8
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise RefusedError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
        param = ".".join(str(part) for part in first["loc"])
        raise RefusedError(400, f"{param or 'body'}: {first['msg']}", param=param or None) from None


class ChatFormat:
    """The responses of a chat completion: `choice` is an entry of a whole one, `delta` and `opening` of a chunk."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str, logprobs: Logprobs) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": finish, **self._logprobs(logprobs)}

    def delta(self, index: int, text: str, finish: str | None = None, logprobs: Logprobs = None) -> dict[str, Any]:
        content = {} if finish else {"content": text}
        return {"index": index, "delta": content, "finish_reason": finish, **self._logprobs(logprobs)}

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

    def choice(self, index: int, text: str, finish: str | None = None, logprobs: Logprobs = None) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": self._logprobs(logprobs)}

    delta = choice  # a chunk has the same shape

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
