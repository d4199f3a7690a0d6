"""What a client may send: the bodies of both endpoints, read within a limit and checked before anything else happens."""

from __future__ import annotations

import json
from typing import Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field, ValidationError

from pi_ray.serving.completion import Ask, RefusedError

ONE_MESSAGE = "send exactly one message, of role 'user', with the query alone: the adapter was trained on that, and system prompts and earlier turns mean nothing to it"


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What both endpoints share. Fields that are not here are ignored, as OpenAI does. Greedy unless a temperature is given."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None

    def query(self) -> str:
        raise NotImplementedError

    def ask(self) -> Ask:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 4 or not all(0 < len(s) <= 100 for s in stop):
            raise RefusedError(400, "stop takes up to 4 strings of 1 to 100 characters", param="stop")
        limit = self.max_completion_tokens or self.max_tokens
        top_p = 1.0 if self.top_p is None else self.top_p
        return Ask(self.model, self.query(), limit, self.temperature or 0.0, top_p, self.seed, tuple(stop))


class ChatBody(Body):
    messages: list[Message]

    def query(self) -> str:
        if len(self.messages) != 1 or self.messages[0].role != "user":
            raise RefusedError(400, ONE_MESSAGE, param="messages")
        return self.messages[0].text


class CompletionBody(Body):
    prompt: str

    def query(self) -> str:
        return self.prompt


async def read(request: Request, kind: type[Body], limit: int) -> Any:
    """The parsed body. Raises RefusedError 413 before more than `limit` bytes are read, 400 for what is not the JSON asked for."""
    too_large = RefusedError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise too_large
    try:
        body = kind.model_validate(json.loads(data.decode("utf-8")))
        body.model_dump_json().encode("utf-8")  # a lone surrogate, spelled \ud800 in JSON, has no UTF-8
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise RefusedError(400, f"{param or 'body'}: {first['msg']}", param=param or None) from None
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
    return body
