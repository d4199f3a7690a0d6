"""The FastAPI app: OpenAI's API over any backend that lists models and completes requests, and the page at /."""

import asyncio
import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pi_ray import __version__
from pi_ray.cluster import auth
from pi_ray.config import ServeConfig
from pi_ray.errors import PiRayError
from pi_ray.serve.engine.completion import Events
from pi_ray.serve.engine.refusal import RefusedError, as_refused_error
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.serve.http.formats import ChatFormat, CompletionFormat
from pi_ray.serve.http.keys import UNRESTRICTED, ApiKey, ApiKeys
from pi_ray.serve.http.openapi import body_of, describe_api
from pi_ray.serve.http.page import get_page
from pi_ray.serve.http.rates import KeyRates
from pi_ray.serve.http.schemas import ChatBody, CompletionBody, read_body
from pi_ray.serve.http.streaming import EventStreamResponse, UsageCounter, merge_streams
from pi_ray.serve.http.tool_calls import split_tool_calls

log = logging.getLogger("ray.serve")
PUBLIC_PATHS = {"/healthz", "/readyz", "/"}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back
UNCANCELLABLE = b"x-request-disconnect-disabled"  # by it Serve would go on with a request whose client has left
Format = ChatFormat | CompletionFormat


class CompletionBackend(Protocol):
    base: str  # the base model's name

    async def models(self) -> list[str]:
        """Names that clients may ask for."""

    async def check_ready(self) -> None:
        """Raise RefusedError unless a token was made lately, if need be for this call."""

    def complete(self, request: CompletionRequest) -> Events:
        """Events as in Completer.complete. Raises RefusedError; closing the iterator stops the generation."""


def create_api(backend: CompletionBackend, serve: ServeConfig, digest: str = "") -> FastAPI:
    """The app. With `digest` (of `keys.key_digest`) or serve.keys_file every path but PUBLIC_PATHS needs a bearer key.

    Without them it answers only programs on its own machine.
    """
    rates = KeyRates(serve.api_replicas, serve.usage_dir)
    api = FastAPI(title="pi-ray", version=__version__, docs_url=None, redoc_url=None, lifespan=rates.keep_usage)
    api.add_middleware(AuthMiddleware, keys=ApiKeys(digest, serve.keys_file, serve.full_prompt))
    for kind in (RefusedError, PiRayError, HTTPException, Exception):
        api.add_exception_handler(kind, lambda request, error: _error_response(_as_refused(error)))
    api.get("/")(get_page)

    @api.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz")
    async def ready() -> dict[str, str]:
        await backend.check_ready()
        return {"status": "ready"}

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        rates.admit(request.state.key)
        names = [name for name in await backend.models() if request.state.key.allows(name)]
        return {"object": "list", "data": [_model(name, backend.base) for name in names]}

    @api.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        rates.admit(request.state.key)
        listed = name.removeprefix(f"{backend.base}:")
        if listed not in await backend.models() or not request.state.key.allows(listed):
            raise RefusedError(404, f"no model {name[:80]!r}", code="model_not_found", param="model")
        return _model(name, backend.base)

    @api.post("/v1/chat/completions", openapi_extra=body_of(ChatBody))
    async def chat_completions(request: Request) -> Any:
        body = await read_body(request, ChatBody, serve.body_limit_bytes)
        return await _respond(backend, serve, rates, request.state.key, body, ChatFormat())

    @api.post("/v1/completions", openapi_extra=body_of(CompletionBody))
    async def completions(request: Request) -> Any:
        body = await read_body(request, CompletionBody, serve.body_limit_bytes)
        return await _respond(backend, serve, rates, request.state.key, body, CompletionFormat())

    api.openapi = partial(describe_api, api)  # type: ignore[method-assign]
    return api


class AuthMiddleware:
    """ASGI middleware that checks the bearer key before anything else, and has it in `request.state.key`.

    A server without keys listens on loopback, where a web page that somebody looks at can reach it too. Browsers mark
    such requests, which are refused: Origin or (DNS rebinding) Host names another site, or Sec-Fetch-Site is
    cross-site, as for images and scripts, which would tell a page what there is. UNCANCELLABLE is refused too.
    """

    def __init__(self, app: Any, keys: ApiKeys):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            if UNCANCELLABLE in dict(scope["headers"]):
                raise RefusedError(400, f"this server takes no header {UNCANCELLABLE.decode()}")
            key = UNRESTRICTED if scope["path"] in PUBLIC_PATHS else self._authenticate(scope["headers"])
        except RefusedError as error:
            return await _error_response(error)(scope, receive, send)
        scope["state"] = {**scope.get("state", {}), "key": key}
        await self.app(scope, receive, send)

    def _authenticate(self, headers: Sequence[tuple[bytes, bytes]]) -> ApiKey:
        if not self.keys:
            given = [(name, value) for name, value in headers if name in (b"host", b"origin", b"sec-fetch-site")]
            sites = [value.decode("latin-1") for name, value in given if name != b"sec-fetch-site"]
            embedded = (b"sec-fetch-site", b"cross-site") in given and b"origin" not in dict(given)
            if not embedded and all(map(_is_local, sites)):
                return UNRESTRICTED
            cure = "as http://127.0.0.1 or http://localhost; give it a key (serve.api_key_env)"
            raise RefusedError(403, f"a server without keys answers its own machine alone, {cure}", code="key_required")
        key = self.keys.find(next((value for name, value in headers if name == b"authorization"), b""))
        if key is None:
            raise RefusedError(401, "a valid key is required: 'Authorization: Bearer KEY'", code="invalid_api_key")
        return key


def _is_local(address: str) -> bool:
    """Whether a Host ("127.0.0.1:8000") or an Origin ("http://localhost") is this machine."""
    try:
        return auth.is_loopback(address if "//" in address else f"//{address}")
    except ValueError:
        return False


def _error_response(error: RefusedError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(_error_body(error), error.status, headers)


def _error_body(error: RefusedError) -> dict[str, Any]:
    """OpenAI's error format."""
    return {"error": {"message": error.message, "type": error.kind, "code": error.code, "param": error.param}}


def _as_refused(error: Exception) -> RefusedError:
    """The error that a client is shown. Of a bug or a lost replica it learns little; the log has all."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, PiRayError):
        return as_refused_error(error)
    if isinstance(error, HTTPException):
        return RefusedError(error.status_code, str(error.detail))
    if isinstance(error, TimeoutError):
        return RefusedError(408, "no answer within the server's time limit", "timeout_error", "request_timeout")
    log.error("request failed", exc_info=error)
    return RefusedError(500, "the server failed to answer; its log says why", "server_error", "internal_error")


def _model(name: str, base: str) -> dict[str, Any]:
    """`parent`, as in vLLM: the base model of an adapter."""
    parent = None if name == base else base
    return {"id": name, "object": "model", "created": 0, "owned_by": "pi-ray", "parent": parent}


async def _respond(
    backend: CompletionBackend, serve: ServeConfig, rates: KeyRates, key: ApiKey, body: ChatBody | CompletionBody,
    form: Format,
) -> Any:
    request_id, model = form.id_prefix + uuid.uuid4().hex, body.model
    requests = body.completion_requests(request_id, serve.max_in_flight)
    _check_permission(key, backend.base, requests[0])
    salt = "" if serve.share_prefix_cache else key.digest[:32]
    requests = [replace(each, cache_salt=salt, base_allowed=key.allows(backend.base)) for each in requests]
    rates.admit(key, len(requests))
    usage = UsageCounter(body.choices)
    charge = partial(rates.charge, key)
    answers = merge_streams(backend, requests)
    answers = split_tool_calls(answers) if isinstance(body, ChatBody) else answers
    events = _guard_events(answers, usage, serve.request_timeout_s, charge)
    start = await anext(events)
    head = {"id": request_id, "created": int(time.time()), "model": model, "system_fingerprint": start["fingerprint"]}
    headers = {"X-Request-Id": request_id, "X-Pi-Ray-Prompt": start["prompt"]}
    if body.stream:
        first = await anext(events)  # a failure until here still gets its own HTTP status
        shown = usage if body.stream_options and body.stream_options.include_usage else None
        stream = _server_sent_events(events, [start, first], head, form, shown)
        return EventStreamResponse(stream, events, {**STREAM_HEADERS, **headers})
    choices = await _collect_choices(events, requests, form)
    return JSONResponse({**head, "object": form.object, "choices": choices, "usage": usage.usage()}, headers=headers)


def _check_permission(key: ApiKey, base: str, request: CompletionRequest) -> None:
    """Raise RefusedError for a model that the key may not use, and for a full prompt, which the base model reads."""
    model = request.model
    # Compare the key's list with the name alone, so that a refusal tells nobody which adapters there are.
    if not key.allows(model) and not key.allows(model.removeprefix(f"{base}:").partition("@")[0]):
        message = f"this key may not use the model {model[:80]!r}"
        raise RefusedError(403, message, code="model_not_allowed", param="model")
    if request.full_prompt and not (key.full_prompt and key.allows(base)):
        cure = "it needs full_prompt: true in serve.keys_file (serve.full_prompt for the key of the environment)"
        message = f"this key may not ask for pi_ray.full_prompt: {cure}, and the base model among its models"
        raise RefusedError(403, message, code="full_prompt_not_allowed", param="pi_ray")


async def _collect_choices(events: Events, requests: Sequence[CompletionRequest], form: Format) -> list[dict[str, Any]]:
    texts, finish = [""] * len(requests), [""] * len(requests)
    logprobs: list[list[dict[str, Any]]] = [[] for _ in requests]
    calls: list[list[dict[str, Any]]] = [[] for _ in requests]
    async with aclosing(events):
        async for event in events:
            index = event["index"]
            texts[index] += event.get("text", "")
            finish[index] = event.get("finish", finish[index])
            logprobs[index] += event.get("logprobs", [])
            calls[index] += event.get("tool_calls", [])
    return [
        form.choice(i, texts[i], finish[i], None if request.logprobs is None else logprobs[i], calls[i])
        for i, request in enumerate(requests)
    ]


async def _server_sent_events(
    events: Events, first: list[dict[str, Any]], head: dict[str, Any], form: Format, usage: UsageCounter | None
) -> AsyncGenerator[str, None]:
    """One event for each piece of text, two for a tool call, then finish reason, usage when asked for, and [DONE].

    An error ends the stream.
    """
    places = defaultdict[int, Iterator[int]](count)  # of an answer's tool calls

    def chunk(*choices: dict[str, Any], **rest: Any) -> str:
        content = {**head, "object": form.chunk_object, "choices": choices, **rest}
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    def chunks(event: dict[str, Any]) -> str:
        index = event["index"]
        if "fingerprint" in event:
            return "".join(map(chunk, form.opening(index)))
        deltas = []
        if "text" in event or "logprobs" in event:
            deltas.append(form.delta(index, event.get("text", ""), None, event.get("logprobs")))
        for call in event.get("tool_calls", ()):
            deltas += form.call_deltas(index, next(places[index]), call)
        if "finish" in event:
            deltas.append(form.delta(index, "", event["finish"]))
        return "".join(map(chunk, deltas))

    try:
        async with aclosing(events):
            for event in first:
                yield chunks(event)
            async for event in events:
                if text := chunks(event):
                    yield text
    except Exception as error:
        yield f"data: {json.dumps(_error_body(_as_refused(error)))}\n\n"
        return
    yield (chunk(usage=usage.usage()) if usage else "") + "data: [DONE]\n\n"


async def _guard_events(
    events: Events, usage: UsageCounter, seconds: float, charge: Callable[[int], None]
) -> Events:
    """The same events, counted. Any failure is a RefusedError, also that `seconds` are over, which stops them.

    At the end `charge` is called with the tokens, however it came about.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        async with aclosing(events):
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    return
                usage.add(event)
                yield event
    except Exception as error:
        raise _as_refused(error) from error
    finally:
        charge(usage.spent)
