"""The HTTP side: an OpenAI-compatible FastAPI app over any backend that lists models and completes Asks. Knows nothing of Ray or torch."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from pi_ray.cluster import auth
from pi_ray.config import ServeConfig
from pi_ray.errors import PiRayError
from pi_ray.serve.engine.completion import Ask, RefusedError, refused
from pi_ray.serve.http.keys import EVERYTHING, Key, Keys, key_digest
from pi_ray.serve.http.openai_format import Chat, Text
from pi_ray.serve.http.page import PATH, page
from pi_ray.serve.http.schemas import Body, ChatBody, CompletionBody, read
from pi_ray.serve.http.streaming import Usage, together

__all__ = ["Backend", "create_api", "error_response", "key_digest"]
log = logging.getLogger("ray.serve")
OPEN_PATHS = {"/healthz", PATH}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}  # whoever is told to come back is told when
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back


class Backend(Protocol):
    base: str  # the base model's name

    async def models(self) -> list[str]:
        """What clients may ask for."""

    def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """As completion.Completer.complete. Raises RefusedError; closing the iterator stops the generation."""


def create_api(backend: Backend, serve: ServeConfig, digest: str = "") -> FastAPI:
    """The app. With `digest` (of `keys.key_digest`) or serve.keys_file every path but /healthz and the page at / needs a bearer key.

    Without them it answers programs of its own machine alone.
    """
    api = FastAPI(title="pi-ray", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_middleware(Guard, keys=Keys(digest, serve.keys_file))
    for kind in (RefusedError, PiRayError, Exception):
        api.add_exception_handler(kind, lambda request, error: error_response(_as_refused(error)))
    api.add_exception_handler(HTTPException, lambda request, error: error_response(RefusedError(error.status_code, str(error.detail))))

    @api.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    api.get(PATH)(page)

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, backend.base) for name in await backend.models() if request.state.key.allows(name)]}

    @api.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        listed = name.removeprefix(f"{backend.base}:")
        if listed not in await backend.models() or not request.state.key.allows(listed):
            raise RefusedError(404, f"no model {name[:80]!r}", code="model_not_found", param="model")
        return _model(name, backend.base)

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await _answer(backend, serve, request.state.key, await read(request, ChatBody, serve.body_limit_bytes), Chat())

    @api.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await _answer(backend, serve, request.state.key, await read(request, CompletionBody, serve.body_limit_bytes), Text())

    return api


class Guard:
    """ASGI middleware: the bearer key before anything else is looked at. `request.state.key` is whose request it is.

    A server without keys listens on loopback, where a web page that somebody looks at can reach it too: its requests bear a foreign name in Origin, or
    (DNS rebinding) in Host, and are refused.
    """

    def __init__(self, app: Any, keys: Keys):
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            key = EVERYTHING if scope["path"] in OPEN_PATHS else self._admit(scope["headers"])
        except RefusedError as error:
            return await error_response(error)(scope, receive, send)
        scope["state"] = {**scope.get("state", {}), "key": key}
        await self.app(scope, receive, send)

    def _admit(self, headers: Sequence[tuple[bytes, bytes]]) -> Key:
        if not self.keys:
            if all(_is_local(value.decode("latin-1")) for name, value in headers if name in (b"host", b"origin")):
                return EVERYTHING
            message = "a server without keys answers its own machine alone, as http://127.0.0.1 or http://localhost; give it a key (serve.api_key_env)"
            raise RefusedError(403, message, code="key_required")
        key = self.keys.find(next((value for name, value in headers if name == b"authorization"), b""))
        if key is None:
            raise RefusedError(401, "a valid key is required: 'Authorization: Bearer KEY'", code="invalid_api_key")
        return key


def _is_local(place: str) -> bool:
    """Whether a Host ("127.0.0.1:8000") or an Origin ("http://localhost") is this machine."""
    try:
        return auth.is_loopback(place if "//" in place else f"//{place}")
    except ValueError:
        return False


def error_response(error: RefusedError) -> JSONResponse:
    """OpenAI's error format."""
    return JSONResponse(_error_body(error), error.status, HEADERS.get(error.status))


def _error_body(error: RefusedError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind, "code": error.code, "param": error.param}}


def _as_refused(error: Exception) -> RefusedError:
    """What a client is told. A bug or a lost replica: logged in full, told in short."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, PiRayError):
        return refused(error)
    if isinstance(error, TimeoutError):
        return RefusedError(408, "no answer within the server's time limit", "timeout_error", "request_timeout")
    log.error("request failed", exc_info=error)
    return RefusedError(500, "the server failed to answer; its log says why", "server_error", "internal_error")


def _model(name: str, base: str) -> dict[str, Any]:
    """`parent`, as vLLM has it: the base model of an adapter."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "pi-ray", "parent": None if name == base else base}


async def _answer(backend: Backend, serve: ServeConfig, key: Key, body: Body, form: Chat | Text) -> Any:
    name = form.prefix + uuid.uuid4().hex
    asks = body.asks(name, serve.places)
    _check_allowed(backend.base, key, body.model)
    usage = Usage(body.choices)
    events = _within(_counted(together(backend, asks), usage), serve.request_timeout_s)
    start = await anext(events)
    head = {"id": name, "created": int(time.time()), "model": start["model"], "system_fingerprint": start["fingerprint"]}
    headers = {"X-Request-Id": name, "X-Pi-Ray-Prompt": start["prompt"]}
    if body.stream:
        first = await anext(events)  # whatever fails until here still gets its own HTTP status
        told = usage if body.stream_options and body.stream_options.include_usage else None
        return StreamingResponse(_server_sent(events, [start, first], head, form, told), media_type="text/event-stream", headers={**STREAM_HEADERS, **headers})
    choices = await _collect(events, len(asks), form, any(ask.logprobs is not None for ask in asks))
    return JSONResponse({**head, "object": form.whole, "choices": choices, "usage": usage.body()}, headers=headers)


def _check_allowed(base: str, key: Key, model: str) -> None:
    """A key's list is compared with the name alone, so that the refusal tells nobody which adapters there are."""
    if not key.allows(model) and not key.allows(model.removeprefix(f"{base}:").partition("@")[0]):
        raise RefusedError(403, f"this key may not use the model {model[:80]!r}", code="model_not_allowed", param="model")


async def _counted(events: AsyncIterator[dict[str, Any]], usage: Usage) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(events):
        async for event in events:
            usage.see(event)
            yield event


async def _collect(events: AsyncIterator[dict[str, Any]], count: int, form: Chat | Text, logprobs: bool) -> list[dict[str, Any]]:
    """The choices of a whole answer."""
    texts, finish = [""] * count, [""] * count
    marks: list[list[dict[str, Any]] | None] = [[] if logprobs else None for _ in range(count)]
    async with aclosing(events):
        async for event in events:
            index = event["index"]
            texts[index] += event.get("text", "")
            finish[index] = event.get("finish", finish[index])
            if logprobs:
                marks[index] += event.get("logprobs", [])
    return [form.choice(i, *parts) for i, parts in enumerate(zip(texts, finish, marks, strict=True))]


async def _server_sent(events: AsyncIterator[dict[str, Any]], begun: list[dict[str, Any]], head: dict[str, Any], form: Chat | Text, usage: Usage | None) -> AsyncIterator[str]:
    """Server-sent events: one for each piece of text, the finish reasons, the usage when asked for, and [DONE]. An error becomes the last event."""

    def line(*choices: dict[str, Any], **rest: Any) -> str:
        return f"data: {json.dumps({**head, 'object': form.piece, 'choices': choices, **rest}, ensure_ascii=False)}\n\n"

    def lines(event: dict[str, Any]) -> str:
        index = event["index"]
        if "fingerprint" in event:
            return "".join(map(line, form.opening(index)))
        text = line(form.delta(index, event["text"], None, event.get("logprobs"))) if "text" in event else ""
        return text + (line(form.delta(index, "", event["finish"])) if "finish" in event else "")

    try:
        async with aclosing(events):
            for event in begun:
                if told := lines(event):
                    yield told
            async for event in events:
                yield lines(event)
    except Exception as error:
        yield f"data: {json.dumps(_error_body(_as_refused(error)))}\n\n"
        return
    yield (line(usage=usage.body()) if usage else "") + "data: [DONE]\n\n"


async def _within(events: AsyncIterator[dict[str, Any]], seconds: float) -> AsyncIterator[dict[str, Any]]:
    """The same events; RefusedError for any failure, among them that `seconds` are over, which also stops the generation."""
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        async with aclosing(events):
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    return
                yield event
    except Exception as error:
        raise _as_refused(error) from error
