"""The HTTP side: an OpenAI-compatible FastAPI app over any backend that lists models and completes Asks. Knows nothing of Ray or torch."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from pi_ray.config import ServeConfig
from pi_ray.serving.body import Body, ChatBody, CompletionBody, read
from pi_ray.serving.completion import Ask, RefusedError

log = logging.getLogger("ray.serve")
OPEN_PATHS = {"/healthz"}


class Backend(Protocol):
    async def models(self) -> list[str]: ...

    def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """As completion.Completer.complete. Raises RefusedError; closing the iterator stops the generation."""


def key_digest(key: str) -> str:
    """What the server keeps of its bearer key; "" for no key."""
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


def create_api(backend: Backend, serve: ServeConfig, digest: str = "") -> FastAPI:
    """The app. With `digest` (of `key_digest`) every path but /healthz needs the bearer key."""
    api = FastAPI(title="pi-ray", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_middleware(Guard, digest=digest)
    api.add_exception_handler(RefusedError, lambda request, error: error_response(error))
    api.add_exception_handler(HTTPException, lambda request, error: error_response(RefusedError(error.status_code, str(error.detail))))

    @api.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "pi-ray"} for name in await backend.models()]}

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await _answer(backend, serve, await read(request, ChatBody, serve.body_limit_bytes), Chat())

    @api.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await _answer(backend, serve, await read(request, CompletionBody, serve.body_limit_bytes), Text())

    return api


class Guard:
    """ASGI middleware: the bearer key before anything else is looked at. The comparison takes the same time for every wrong key."""

    def __init__(self, app: Any, digest: str):
        self.app = app
        self.digest = digest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.digest and scope["path"] not in OPEN_PATHS and not self._knows(scope["headers"]):
            error = RefusedError(401, "a valid key is required: 'Authorization: Bearer KEY'", code="invalid_api_key")
            await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _knows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        scheme, _, key = next((value for name, value in headers if name == b"authorization"), b"").partition(b" ")
        return hmac.compare_digest(hashlib.sha256(key.strip()).hexdigest(), self.digest) and scheme.lower() == b"bearer"


def error_response(error: RefusedError, headers: dict[str, str] | None = None) -> JSONResponse:
    """OpenAI's error format. Whoever is told to come back is told when."""
    retry = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(_error_body(error), error.status, {**retry, **(headers or {})})


def _error_body(error: RefusedError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind, "code": error.code, "param": error.param}}


def _as_refused(error: Exception) -> RefusedError:
    """A bug or a lost replica: logged in full, told in short."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, TimeoutError):
        return RefusedError(408, "no answer within the server's time limit", "timeout_error", "request_timeout")
    log.error("request failed", exc_info=error)
    return RefusedError(500, "the server failed to answer; its log says why", "server_error", "internal_error")


class Chat:
    """How a chat completion looks, whole and in pieces."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, finish: str) -> dict[str, Any]:
        return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}

    def delta(self, text: str, finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": {} if finish else {"content": text}, "finish_reason": finish}

    def opening(self) -> list[dict[str, Any]]:
        """The role comes once: clients join the pieces of every field."""
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]


class Text:
    """How a plain completion looks."""

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}

    def delta(self, text: str, finish: str | None = None) -> dict[str, Any]:
        return self.choice(text, finish)

    def opening(self) -> list[dict[str, Any]]:
        return []


async def _answer(backend: Backend, serve: ServeConfig, body: Body, form: Chat | Text) -> Any:
    events = _within(backend.complete(body.ask()), serve.request_timeout_s)
    start = await anext(events)
    head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": start["model"], "system_fingerprint": start["fingerprint"]}
    if body.stream:
        first = await anext(events)  # whatever fails until here still gets its own HTTP status
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_server_sent(events, start, first, head, form, usage), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    async with aclosing(events):
        *pieces, last = [event async for event in events]
    text = "".join(event["text"] for event in pieces)
    return {**head, "object": form.whole, "choices": [form.choice(text, last["finish"])], "usage": _usage(start, last)}


async def _server_sent(events: AsyncIterator[dict[str, Any]], start: dict, first: dict, head: dict, form: Chat | Text, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: one for each piece of text, the finish reason, the usage when asked for, and [DONE]. An error becomes the last event."""

    def line(**rest: Any) -> str:
        return f"data: {json.dumps({**head, 'object': form.piece, **rest}, ensure_ascii=False)}\n\n"

    try:
        async with aclosing(events):
            for choice in form.opening():
                yield line(choices=[choice])
            event = first
            while "finish" not in event:
                yield line(choices=[form.delta(event["text"])])
                event = await anext(events)
            yield line(choices=[form.delta("", event["finish"])])
    except Exception as error:
        yield f"data: {json.dumps(_error_body(_as_refused(error)))}\n\n"
        return
    if usage:
        yield line(choices=[], usage=_usage(start, event))
    yield "data: [DONE]\n\n"


def _usage(start: dict[str, Any], last: dict[str, Any]) -> dict[str, int]:
    """`prompt_tokens_saved` is pi-ray's own: the tokens of template and examples that need not be sent."""
    sent, made = start["prompt_tokens"], last["completion_tokens"]
    return {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made, "prompt_tokens_saved": start["saved"]}


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
