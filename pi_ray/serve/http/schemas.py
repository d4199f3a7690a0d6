"""OpenAI's schemas of request bodies, validated before anything else happens."""

import asyncio
from dataclasses import replace
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from starlette.requests import ClientDisconnect

from pi_ray.conversation import check_tools
from pi_ray.serve.engine.grammar import AnswerFormat
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.request import CompletionRequest

History = tuple[tuple[str, str], ...]  # (role, text) of the messages before the query
MAX_CHOICES = 16
MAX_STOP = 4
STOP_RULE = f"stop takes up to {MAX_STOP} strings of 1 to 100 characters"
BODY_TIMEOUT_S = 30.0
MAX_MESSAGES = 256  # of a conversation, and of the parts of a message: each one costs time, however short it is
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# Fields that would change the answer and are not supported -> values that change nothing and are let through. Other
# unknown fields are ignored. A chat knows tools and response_format.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "echo": (False,), "suffix": ("",),
    # other servers' own
    "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
}


class TextPart(BaseModel):
    type: str
    text: str

    @field_validator("type")
    @classmethod
    def _check_type(cls, kind: str) -> str:
        if kind != "text":
            raise ValueError(f"a part of type {kind[:40]!r}; only text is taken, no images, audio or files")
        return kind


class Message(BaseModel):
    role: str
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content must be text, unless an assistant's message has tool_calls")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    def as_dict(self) -> dict[str, Any]:
        """The message as conversations have it."""
        rest = {"tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return {"role": ROLES[self.role], "content": self.text, **{k: v for k, v in rest.items() if v}}


class FunctionName(BaseModel):
    name: str


class NamedToolChoice(BaseModel):
    type: Literal["function"]
    function: FunctionName


class TextFormat(BaseModel):
    type: Literal["text"]

    def answer(self) -> AnswerFormat:
        return AnswerFormat()


class JsonObjectFormat(BaseModel):
    type: Literal["json_object"]

    def answer(self) -> AnswerFormat:
        return AnswerFormat({"type": "object"})


class NamedSchema(BaseModel):
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    def answer(self) -> AnswerFormat:
        return AnswerFormat(self.json_schema.content, bool(self.json_schema.strict))


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

    @field_validator("stop", mode="before")  # before pydantic makes an error of each wrong item
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        if isinstance(stop, list) and len(stop) > MAX_STOP:
            raise ValueError(STOP_RULE)
        return stop

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def _requests(
        self, prompts: list[tuple[History, str]], logprobs: int | None, request_id: str, capacity: int, **chat: Any
    ) -> list[CompletionRequest]:
        """One for each choice, choices of one prompt in a row. `chat` are further fields.

        Raises RefusedError for more than `capacity` at once.
        """
        for field, neutral in UNSUPPORTED_FIELDS.items():
            value = (self.model_extra or {}).get(field)
            if value is not None and value not in neutral:
                raise _unsupported(field)
        total, limit = len(prompts) * self.choices, min(capacity, MAX_CHOICES)
        if total > limit:
            raise RefusedError(400, f"at most {limit} answers at once: prompts times n is {total}", param="n")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not all(0 < len(s) <= 100 for s in stop):
            raise RefusedError(400, STOP_RULE, param="stop")
        requests = [
            CompletionRequest(
                self.model, query, self.max_completion_tokens or self.max_tokens, self.temperature or 0.0,
                1.0 if self.top_p is None else self.top_p, self.seed, tuple(stop), history, logprobs, choices=total,
                sticky_key=self.user or request_id, full_prompt=bool(self.pi_ray and self.pi_ray.full_prompt), **chat,
            )
            for history, query in prompts
        ]
        return [choice for request in requests for choice in request.for_choices(self.choices)]


class ChatBody(RequestBody):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = Field(None, discriminator="type")

    @field_validator("tools", mode="before")
    @classmethod
    def _check_tools(cls, tools: Any) -> Any:
        check_tools(tools or [])
        return tools

    def completion_requests(self, request_id: str, capacity: int) -> list[CompletionRequest]:
        """The last message is the query, or a tool's result; an old client may send template and examples before it."""
        *history, last = self.messages
        if last.role not in ("user", "tool") or any(m.role not in ROLES for m in history):
            allowed = "role 'user' or 'tool', and those before it of role 'system', 'user', 'assistant' or 'tool'"
            raise RefusedError(400, f"the last message must be of {allowed}", param="messages")
        if self.top_logprobs and not self.logprobs:
            raise RefusedError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        prompt = tuple((ROLES[m.role], m.text) for m in history), last.text
        chat = {
            "messages": tuple(m.as_dict() for m in self.messages), "tools": tuple(self.tools or ()),
            "answer": self._answer_format(),
        }
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._requests([prompt], logprobs, request_id, capacity, **chat)

    def _answer_format(self) -> AnswerFormat:
        answer = self.response_format.answer() if self.response_format else AnswerFormat()
        choice, parallel = self.tool_choice or "auto", self.parallel_tool_calls is not False
        if isinstance(choice, NamedToolChoice):
            return replace(answer, tool_choice="required", function=choice.function.name, parallel_calls=parallel)
        return replace(answer, tool_choice=choice, parallel_calls=parallel)


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
    except ClientDisconnect:
        raise RefusedError(499, "the client left") from None
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT_S} s"
        raise RefusedError(408, message, "timeout_error", "body_timeout") from None
    try:
        return kind.model_validate_json(bytes(data))  # refuses a lone surrogate as well, which has no UTF-8
    except ValidationError as error:
        # of a value that fits no alternative, the error that lies deepest says most
        first = max(error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
        if first["type"] == "json_invalid":
            raise RefusedError(400, "the body is not JSON in UTF-8", code="invalid_json") from None
        param = ".".join(str(part) for part in first["loc"])
        raise RefusedError(400, f"{param or 'body'}: {first['msg']}", param=param or None) from None
