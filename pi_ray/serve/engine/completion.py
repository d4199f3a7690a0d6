"""One completion: adapter, prompt ids and limits on the way in, token ids back into text on the way out."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError, ModelError, PiRayError
from pi_ray.models import base_name
from pi_ray.protocols import GenerationRequest
from pi_ray.serve.engine.detokenizer import IncrementalDetokenizer, LogprobsBuffer
from pi_ray.serve.engine.prompt_reader import PromptReader
from pi_ray.serve.engine.refusal import RefusedError, as_refused_error
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.store.adapters import Adapter, AdapterStore, check_unchanged

log = logging.getLogger("ray.serve")
COLD_THREADS = 4  # in which adapters are opened for the first time
COLD_PATIENCE_S = 2.0  # after which a request for such an adapter gives its place to others, where many wait
Events = AsyncGenerator[dict[str, Any], None]  # of one answer, see Completer.complete


class ColdAdapterError(Exception):
    """Opening the adapter `spec`, name@version, may take long."""

    def __init__(self, spec: str):
        super().__init__(spec)
        self.spec = spec


def requested_adapter(model: str, base: str) -> str | None:
    """The adapter that `model` asks for, unchecked: "x" and "<base>:x" give "x", the base's own name gives None."""
    name = base_name(base)
    return None if model == name else model.removeprefix(f"{name}:")


def served_models(config: RunConfig, store: AdapterStore) -> list[str]:
    """Names that clients may ask for: the base model and the adapters, or the one that is merged into the base."""
    if config.serve.merge:
        return [config.serve.merge.partition("@")[0]]
    return [base_name(config.model.base), *store.names()]


class Completer:
    """Answers CompletionRequests with one engine and one adapter store."""

    def __init__(self, config: RunConfig, engine: Any, tokenizer: Any, context: int, store: Any = None):
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.reader = PromptReader(config, tokenizer, context)
        self.store = store or AdapterStore(config.store, config.model)
        self.merged: Adapter | None = None
        self._reported_version = ""
        self._cold_threads = ThreadPoolExecutor(COLD_THREADS, "open")
        self._opening: dict[str, asyncio.Future[PiRayError | None]] = {}  # name@version -> its first opening, under way
        self._waiting = 0  # requests for adapters that are being opened; half of a replica's places are for others
        self._most_waiting = max(1, config.serve.max_ongoing_requests // 2)

    def merge(self, spec: str) -> None:
        """Before the first request: merge this adapter into the base. It alone is served from then on."""
        adapter = self.store.open(spec)
        self.engine.merge(str(adapter.path))
        check_unchanged(adapter.path, adapter.hash)
        self.merged = adapter

    async def complete(self, request: CompletionRequest) -> Events:
        """First {"model", "fingerprint", "adapter", "prompt", "prompt_tokens", "saved", "may_call", "functions",
        "bare_calls"}, then {"text"} pieces, each with the "tokens" since the one before, last {"finish",
        "completion_tokens"}. Raises RefusedError.

        "fingerprint" is the model that answers, "adapter" the one that was asked for or "", "prompt" a GuardResult's
        kind, "full" or "base"; "may_call" says whether the text may hold tool calls, "functions" of which (None:
        any), "bare_calls" whether also without marks, which no grammar allows. Pieces have "logprobs", entries of
        LogprobsBuffer, when asked for.
        """
        given_up = threading.Event()  # by its caller: the thread that prepares it need not go on
        try:
            start, generation = await asyncio.to_thread(self._prepare, request, given_up)
        except ColdAdapterError as cold:
            await self._wait_for_cold(cold.spec)
            start, generation = await asyncio.to_thread(self._prepare, request, given_up, is_open=True)
        finally:
            given_up.set()
        yield start
        text = IncrementalDetokenizer(self.tokenizer, request.stop)
        logprobs = None if request.logprobs is None else LogprobsBuffer(self.tokenizer)
        try:
            async with aclosing(self.engine.generate(generation)) as tokens:
                async for token in tokens:
                    if logprobs:
                        logprobs.add(len(text.text), token)
                    if piece := text.push(token.id):
                        yield _text_event(piece, text, logprobs)
        except (AdapterError, ModelError) as error:
            raise as_refused_error(error) from error
        if piece := text.finish():
            yield _text_event(piece, text, logprobs)
        full = text.count >= generation.max_new_tokens and not text.stopped
        yield {"finish": "length" if full else "stop", "completion_tokens": text.count}

    async def _wait_for_cold(self, spec: str) -> None:
        """Wait until an adapter is open. Raises RefusedError: what is wrong with it, or that it takes long and others
        need the place.
        """
        if spec not in self._opening:
            self._opening[spec] = asyncio.ensure_future(self._open_cold(spec))
        opening = self._opening[spec]
        self._waiting += 1
        try:
            done, _ = await asyncio.wait({opening}, timeout=COLD_PATIENCE_S)
            if not done and self._waiting > self._most_waiting:
                message = f"the adapter {spec} takes long to load, and {self._waiting} requests wait for such adapters"
                raise RefusedError(429, message, "rate_limit_error", "adapter_loading", "model")
            if error := await asyncio.shield(opening):
                raise as_refused_error(error) from error
        finally:
            self._waiting -= 1

    async def _open_cold(self, spec: str) -> PiRayError | None:
        """Open an adapter for the first time, in threads that no warm one needs -> the error of all who wait for it."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._cold_threads, self.store.open, spec, "")
            return None
        except PiRayError as error:
            return error
        finally:
            del self._opening[spec]

    def _prepare(
        self, request: CompletionRequest, given_up: threading.Event, is_open: bool = False
    ) -> tuple[dict[str, Any], GenerationRequest]:
        """Find the adapter and tokenise -> (first event, request to the engine). Blocks.

        Unless the adapter `is_open`, one that has yet to be fetched or verified is a ColdAdapterError.
        """
        name = requested_adapter(request.model, self.config.model.base)
        try:
            adapter = None if name is None else self._open(name, request.sticky_key, is_open)
            guarded = self.reader.guard(request, adapter, given_up)
            # A prompt that the adapter was not trained on is read by the base model.
            answering = None if guarded.kind in ("drifted", "full") else adapter
            if self.merged and answering != self.merged:
                others = "no other adapter or version, and not the base, which would answer a full or changed prompt"
                merged = f"{self.merged.name}@{self.merged.version} merged into the base model (serve.merge)"
                raise AdapterError(f"this server has {merged} and serves it alone: {others}")
            read = self.reader.read(request, guarded, adapter, given_up)
        except PiRayError as error:
            raise as_refused_error(error) from error
        requested = f"{adapter.name}@{adapter.version}" if adapter else ""
        start = {
            "model": request.model, "fingerprint": requested if answering else base_name(self.config.model.base),
            "adapter": requested, "prompt": guarded.kind if adapter else "base", "prompt_tokens": len(read.ids),
            "saved": read.saved, "may_call": read.may_call, "functions": read.functions, "bare_calls": not read.grammar,
        }
        folder, found = (str(answering.path), answering.hash) if answering else ("", "")
        return start, GenerationRequest(
            read.ids, read.max_new_tokens, folder, request.temperature, request.top_p, request.seed, request.stop,
            request.logprobs, found, request.cache_salt, read.grammar,
        )

    def _open(self, name: str, sticky_key: str, is_open: bool) -> Adapter:
        """The adapter. A merged one keeps its name when another version is released, which the log says once."""
        if self.merged is None or name != self.merged.name:
            if not is_open and (cold := self.store.cold_version(name, sticky_key)):
                raise ColdAdapterError(cold)
            return self.store.open(name, sticky_key)
        with suppress(AdapterError):  # also while the store is out of reach
            _, version = self.store.resolve(name)
            if version not in (self.merged.version, self._reported_version):
                self._reported_version = version
                what = "is merged into the base model and goes on answering; deploy again to have"
                log.warning("%s@%s %s %s", name, self.merged.version, what, version)
        return self.merged


def _text_event(text: str, detokenizer: IncrementalDetokenizer, logprobs: LogprobsBuffer | None) -> dict[str, Any]:
    event = {"text": text, "tokens": detokenizer.take_count()}
    return {**event, "logprobs": logprobs.take(detokenizer)} if logprobs else event
