"""What a client may send: the bodies of both endpoints, read within a limit and checked before anything else happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field, ValidationError

from pi_ray.serve.engine.completion import Ask, RefusedError, several

MAX_CHOICES = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What would change the answer and cannot be done here: refused unless it is left at what changes nothing. Other unknown fields are ignored.
IDLE: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (), "echo": (False,), "suffix": ("",),
    "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,),  # from here on other servers' own
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
}  # fmt: skip


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


class Extras(BaseModel):
    """What OpenAI's API does not have. `full_prompt`: for comparison, the base model answers, with the adapter's whole template before the query."""

    model_config = {"extra": "forbid"}

    full_prompt: bool = False


class Body(BaseModel):
    """What both endpoints share. Greedy unless a temperature is given."""

    model_config = {"extra": "allow"}

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
    pi_ray: Extras | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def asks(self, ticket: str, places: int) -> list[Ask]:
        """One for each choice, those of a prompt side by side, in a server that has so many places. `ticket` names the request where no `user` does."""
        self._refuse_unsupported()
        prompts = list(self.prompts())
        total, most = len(prompts) * self.choices, min(places, MAX_CHOICES)
        if total > most:
            raise RefusedError(400, f"at most {most} answers at once: prompts times n is {total}", param="n")
        shared = {
            "max_tokens": self.max_completion_tokens or self.max_tokens, "temperature": self.temperature or 0.0, "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed, "stop": self._stop(), "logprobs": self.tops(), "choices": total, "ticket": self.user or ticket,
            "full_prompt": bool(self.pi_ray and self.pi_ray.full_prompt),
        }  # fmt: skip
        return [each for before, query in prompts for each in several(Ask(self.model, query, before=before, **shared), self.choices)]

    def _refuse_unsupported(self) -> None:
        for field, idle in IDLE.items():
            value = (self.model_extra or {}).get(field)
            if value is not None and value not in idle:
                raise RefusedError(400, f"{field} is not supported here; leave it out", code="unsupported_parameter", param=field)

    def _stop(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 4 or not all(0 < len(s) <= 100 for s in stop):
            raise RefusedError(400, "stop takes up to 4 strings of 1 to 100 characters", param="stop")
        return tuple(stop)

    def prompts(self) -> Iterator[tuple[tuple[tuple[str, str], ...], str]]:
        """(messages before the query, query) of each prompt."""
        raise NotImplementedError

    def tops(self) -> int | None:
        """Ask.logprobs."""
        raise NotImplementedError


class ChatBody(Body):
    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> Iterator[tuple[tuple[tuple[str, str], ...], str]]:
        """The last message, and those before it, in which an old client may still send the template and its examples."""
        *before, last = self.messages or [None]
        if last is None or last.role != "user" or any(m.role not in ROLES for m in before):
            raise RefusedError(400, "the last message must be of role 'user', and those before it of role 'system', 'user' or 'assistant'", param="messages")
        yield tuple((ROLES[m.role], m.text) for m in before), last.text

    def tops(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RefusedError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    def prompts(self) -> Iterator[tuple[tuple[tuple[str, str], ...], str]]:
        if self.best_of and self.best_of != self.choices:
            raise RefusedError(400, "best_of is not supported here; leave it out", code="unsupported_parameter", param="best_of")
        yield from (((), prompt) for prompt in ([self.prompt] if isinstance(self.prompt, str) else self.prompt))

    def tops(self) -> int | None:
        return self.logprobs


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
        content = json.loads(data.decode("utf-8"))
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # a lone surrogate, spelled \ud800 in JSON, has no UTF-8
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        raise RefusedError(400, f"{param or 'body'}: {first['msg']}", param=param or None) from None
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
