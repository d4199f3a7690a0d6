"""One completion from query to text: which adapter, which prompt ids, which limits, and token ids back into text piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pi_ray.config import PromptConfig, RunConfig
from pi_ray.errors import AdapterError, PiRayError
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import GenerationRequest
from pi_ray.serving.adapters import Adapter, AdapterStore, UnknownAdapterError


@dataclass(frozen=True)
class Ask:
    """A valid request without its HTTP clothes. `max_tokens` None: twice the longest answer that the adapter was trained on."""

    model: str
    query: str
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class RefusedError(Exception):
    """A request that cannot be answered: HTTP status, and OpenAI's `type`, `code` and `param`. Survives pickling between processes."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None):
        super().__init__(status, message, kind, code, param)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param


def base_name(base: str) -> str:
    """What clients call the base model: its name, or the last part of a folder or file."""
    return Path(base).name.removesuffix(".gguf") if base.startswith(("/", ".", "~")) else base


def adapter_of(model: str, base: str) -> str | None:
    """The adapter that `model` asks for: "x" and "<base>:x" give "x", the base's own name gives None. The result is not checked yet."""
    name = base_name(base)
    return None if model == name else model.removeprefix(f"{name}:")


class Completer:
    """Answers Asks with one engine and one store."""

    def __init__(self, config: RunConfig, engine: Any, tokenizer: Any, context: int):
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.context = context
        self.store = AdapterStore(config.store, config.model)
        self._encoder = lru_cache(maxsize=64)(lambda prompt: PromptEncoder(tokenizer, prompt))

    def prompt_ids(self, query: str, adapter: Adapter | None) -> list[int]:
        """Exactly the ids that the adapter's last phase trained on; for the bare base model the query in the run's prompt format."""
        if adapter is None:
            return self._encoder(self.config.prompt).encode(query).ids
        return self._encoder(PromptConfig(**adapter.card["prompt"])).encode(query, adapter.card["template"]).ids

    async def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """First {"model", "fingerprint", "prompt_tokens", "saved"}, then {"text"} pieces, last {"finish", "completion_tokens"}. Raises RefusedError."""
        adapter, request = await asyncio.to_thread(self._request, ask)
        saved = round(adapter.card["full_prompt_tokens"] - adapter.card["query_prompt_tokens"]) if adapter else 0
        yield {
            "model": ask.model,
            "fingerprint": f"{adapter.name}@{adapter.version}" if adapter else base_name(self.config.model.base),
            "prompt_tokens": len(request.prompt_ids),
            "saved": max(saved, 0),
        }
        text = TextStream(self.tokenizer, ask.stop)
        try:
            async with aclosing(self.engine.generate(request)) as tokens:
                async for token in tokens:
                    if piece := text.push(token):
                        yield {"text": piece}
        except AdapterError as error:
            raise _refused(error) from error
        if piece := text.finish():
            yield {"text": piece}
        length = text.count >= request.max_new_tokens and not text.stopped
        yield {"finish": "length" if length else "stop", "completion_tokens": text.count}

    def _request(self, ask: Ask) -> tuple[Adapter | None, GenerationRequest]:
        """Blocking: reads and verifies the adapter the first time, and tokenises."""
        name = adapter_of(ask.model, self.config.model.base)
        try:
            adapter = None if name is None else self.store.open(name)
            ids = self.prompt_ids(ask.query, adapter)
        except PiRayError as error:
            raise _refused(error) from error
        limit = self._limit(ask.max_tokens, adapter, len(ids))
        folder = str(adapter.path) if adapter else ""
        return adapter, GenerationRequest(ids, limit, folder, ask.temperature, ask.top_p, ask.seed, ask.stop)

    def _limit(self, asked: int | None, adapter: Adapter | None, prompt: int) -> int:
        """max_new_tokens. A limit that was asked for is kept or refused, never silently lowered."""
        cap, room = self.config.serve.max_new_tokens, self.context - prompt
        if asked is not None and asked > cap:
            raise RefusedError(400, f"max_tokens is {asked}; this server allows at most {cap}", param="max_tokens")
        if room < (asked or 1):
            message = f"the prompt has {prompt} tokens and {asked or 1} may be generated; the model's context holds {self.context}"
            raise RefusedError(400, message, code="context_length_exceeded", param="messages")
        return asked or min(2 * adapter.card["max_answer_tokens"] if adapter else cap, cap, room)


def _refused(error: PiRayError) -> RefusedError:
    """Unknown adapter: 404. An adapter that fails verification, or a prompt format that the base model's chat template does not allow: 422."""
    if isinstance(error, UnknownAdapterError):
        return RefusedError(404, str(error), code="model_not_found", param="model")
    code = "adapter_refused" if isinstance(error, AdapterError) else "model_refused"
    return RefusedError(422, str(error), code=code, param="model")


class TextStream:
    """Token ids in, text out as early as possible: the joined pieces equal `PromptEncoder.decode`, cut before the first stop string.

    A piece is held back while it may still change (half a character), may be trimmed (white space at the end), or may be the start of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.count = 0
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._ids: list[int] = []
        self._read = 0  # ids up to here are in the text
        self._context = 0  # decoding starts here, so that a token's leading space shows
        self._held = ""
        self._started = False

    def push(self, token: int) -> str:
        """The text that is certain after this token; empty after the end."""
        if self.stopped:
            return ""
        self.count += 1
        if token == self._tokenizer.eos_token_id:
            self.stopped = True
            return ""
        self._ids.append(token)
        known = self._decode(self._ids[self._context : self._read])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(known) or text.endswith("\ufffd"):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        known = self._decode(self._ids[self._context : self._read])
        self._held += self._decode(self._ids[self._context :])[len(known) :]
        self._cut()
        rest, self._held = self._held.rstrip(), ""
        return rest if self._started else rest.lstrip()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        self._held += text
        if self._cut():
            return ""
        certain = self._held[: max(0, len(self._held) - self._hold)].rstrip()
        piece = certain if self._started else certain.lstrip()
        self._held = self._held[len(certain) :]
        self._started = self._started or bool(piece)
        return piece

    def _cut(self) -> bool:
        """Cut the held text before the first stop string in it."""
        places = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if places:
            self._held, self.stopped = self._held[: min(places)], True
        return bool(places)
