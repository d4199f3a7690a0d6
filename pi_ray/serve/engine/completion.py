"""One completion: adapter, prompt ids and limits on the way in, token ids back into text on the way out."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Self

from pi_ray.config import PromptConfig, RunConfig
from pi_ray.errors import AdapterError, ModelError, PiRayError
from pi_ray.models import base_name
from pi_ray.prompt import PromptEncoder, content_ids
from pi_ray.protocols import GenerationRequest
from pi_ray.serve.engine.detokenizer import IncrementalDetokenizer, LogprobsBuffer
from pi_ray.serve.engine.refusal import RefusedError, as_refused_error
from pi_ray.store.adapters import Adapter, AdapterStore, check_unchanged
from pi_ray.store.prompt_guard import EMPTY_GUARD, GuardResult

log = logging.getLogger("ray.serve")
QUERY_ONLY_MESSAGE = (
    "send exactly one message, of role 'user', with the query alone: the adapter was trained on that, and a system "
    "prompt or earlier turns mean nothing to it, unless they are those of the prompt that it has taken in"
)
COUNT_CHUNK_CHARS = 16_384  # a longer text is first counted in pieces: a tokenizer can take seconds for one long word
COLD_THREADS = 4  # in which adapters are opened for the first time
MAX_CHARS_PER_TOKEN = 32  # by which a request's text is bounded before anything reads it; English has 4 or 5
Events = AsyncGenerator[dict[str, Any], None]  # of one answer, see Completer.complete


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request for one answer, whichever endpoint it came to."""

    model: str
    query: str
    max_tokens: int | None = None  # None: twice the longest answer that the adapter was trained on
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()  # (role, text) of the messages before the query: system, user, assistant
    logprobs: int | None = None  # likeliest tokens to report beside each one; None: no log-probabilities
    choices: int = 1  # answers that share the server's token limit
    sticky_key: str = ""  # requests with the same key meet the same version while a canary is out
    cache_salt: str = ""  # requests of different salts share no cached prefix
    base_allowed: bool = True  # whether the base model may answer in the adapter's place, where the prompt has changed
    full_prompt: bool = False  # for comparison: the base model answers, with the adapter's whole template

    @property
    def full_text(self) -> str:
        """All text that the client sent."""
        return "\n\n".join(text for text in (*(text for _, text in self.history), self.query) if text)

    def for_choices(self, n: int) -> list[Self]:
        """The request for each of `n` answers to this prompt. A seed gives each one its own, so that they differ."""
        if self.seed is None:
            return [self] * n
        return [replace(self, seed=(self.seed + i + 2**63) % 2**64 - 2**63) for i in range(n)]


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
        self.context = context  # tokens
        self.store = store or AdapterStore(config.store, config.model)
        self.merged: Adapter | None = None
        self._reported_version = ""
        self._cold_threads = ThreadPoolExecutor(COLD_THREADS, "open")
        self._opening: dict[str, asyncio.Future[PiRayError | None]] = {}  # name@version -> its first opening, under way
        self._encoder = lru_cache(maxsize=64)(lambda prompt: PromptEncoder(tokenizer, prompt))

    def merge(self, spec: str) -> None:
        """Before the first request: merge this adapter into the base. It alone is served from then on."""
        adapter = self.store.open(spec)
        self.engine.merge(str(adapter.path))
        check_unchanged(adapter.path, adapter.hash)
        self.merged = adapter

    def prompt_ids(self, query: str, adapter: Adapter | None) -> list[int]:
        """The ids that the adapter's last phase trained on; for the base model the query in the run's prompt format."""
        if adapter is None:
            return self._encoder(self.config.prompt).encode(query)
        return self._adapter_ids(query, adapter, adapter.card["template"])

    async def complete(self, request: CompletionRequest) -> Events:
        """First {"model", "fingerprint", "adapter", "prompt", "prompt_tokens", "saved"}, then {"text"} pieces, each
        with the "tokens" since the one before, last {"finish", "completion_tokens"}. Raises RefusedError.

        "fingerprint" is the model that answers, "adapter" the one that was asked for or "", "prompt" a GuardResult's
        kind, "full" or "base". Pieces have "logprobs", entries of LogprobsBuffer, when asked for.
        """
        given_up = threading.Event()  # by its caller: the thread that prepares it need not go on
        try:
            start, generation = await asyncio.to_thread(self._prepare, request, given_up)
        except ColdAdapterError as cold:
            if cold.spec not in self._opening:
                self._opening[cold.spec] = asyncio.ensure_future(self._open_cold(cold.spec))
            if error := await asyncio.shield(self._opening[cold.spec]):
                raise as_refused_error(error) from error
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
        count = partial(self._count_up_to, given_up)
        try:
            adapter = None if name is None else self._open(name, request.sticky_key, is_open)
            self._check_chars(request, adapter)
            guarded = GuardResult("full", request.query) if request.full_prompt else self._guard(request, adapter)
            if guarded.kind == "drifted" and not request.base_allowed:
                cure = "send the query alone, or the prompt that the adapter was trained with"
                message = f"this key may not use the base model, which answers a changed prompt; {cure}"
                raise RefusedError(403, message, code="model_not_allowed", param="messages")
            text = request.full_text if guarded.kind == "conversation" else guarded.text
            if len(text) > COUNT_CHUNK_CHARS and (tokens := count(2 * self.context, text)) > 2 * self.context:
                raise self._too_long(f"more than {tokens - 1}", 1)
            # A prompt that the adapter was not trained on is read by the base model.
            answering = None if guarded.kind in ("drifted", "full") else adapter
            if self.merged and answering != self.merged:
                others = "no other adapter or version, and not the base, which would answer a full or changed prompt"
                merged = f"{self.merged.name}@{self.merged.version} merged into the base model (serve.merge)"
                raise AdapterError(f"this server has {merged} and serves it alone: {others}")
            ids = self._encode(request, guarded, adapter)
        except PiRayError as error:
            raise as_refused_error(error) from error
        limit = self._max_new_tokens(request, adapter, len(ids))
        requested = f"{adapter.name}@{adapter.version}" if adapter else ""
        start = {
            "model": request.model, "fingerprint": requested if answering else base_name(self.config.model.base),
            "adapter": requested, "prompt": guarded.kind if adapter else "base",
            "prompt_tokens": len(ids), "saved": self._saved_tokens(request, adapter, guarded.kind, len(ids), count),
        }
        folder, found = (str(answering.path), answering.hash) if answering else ("", "")
        return start, GenerationRequest(
            ids, limit, folder, request.temperature, request.top_p, request.seed, request.stop, request.logprobs, found,
            request.cache_salt,
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

    def _guard(self, request: CompletionRequest, adapter: Adapter | None) -> GuardResult:
        """Take away the prompt that came with the query. Raises RefusedError for a history of another prompt."""
        if adapter is None:
            return GuardResult("conversation" if request.history else "internalised", request.query)
        guard = adapter.guard if adapter.guard and self.config.serve.drift_guard else EMPTY_GUARD
        system = "\n\n".join(text for role, text in request.history if role == "system")
        turns = [(role, text) for role, text in request.history if role != "system"]
        guarded = guard.inspect(system, request.query, turns)
        if guarded.kind == "unknown":
            raise RefusedError(400, QUERY_ONLY_MESSAGE, param="messages")
        if guarded.kind == "stripped" and not guarded.text:
            raise RefusedError(400, "there is no query behind the template", param="messages")
        return guarded

    def _encode(self, request: CompletionRequest, guarded: GuardResult, adapter: Adapter | None) -> list[int]:
        if guarded.kind == "conversation":
            try:
                messages = [*request.history, ("user", request.query)]
                return self._encoder(PromptConfig(chat="none")).conversation(messages)
            except ModelError as error:
                raise RefusedError(400, str(error), param="messages") from error
        if guarded.kind == "full":
            if adapter is None or adapter.guard is None:
                needs = "needs as model an adapter that was published with its prompt; publish it again"
                raise RefusedError(400, f"pi_ray.full_prompt {needs}", param="pi_ray")
            return self._adapter_ids(guarded.text, adapter, adapter.guard.template)
        if adapter and guarded.kind == "drifted":
            return self._adapter_ids(guarded.text, adapter, query="{query}")
        return self.prompt_ids(guarded.text, adapter)

    def _adapter_ids(self, text: str, adapter: Adapter, template: str = "", **changed: str) -> list[int]:
        """Ids of `text` in the adapter's prompt format; `query="{query}"` for a whole prompt as a client words it."""
        return self._encoder(PromptConfig(**{**adapter.card["prompt"], **changed})).encode(text, template)

    def _saved_tokens(
        self, request: CompletionRequest, adapter: Adapter | None, kind: str, read: int,
        count: Callable[[int, str], int],
    ) -> int:
        """Tokens that the model need not read, because the guard took them away or the client did not send them."""
        if adapter is None or kind == "full":
            return 0
        usual, text = round(adapter.card["full_prompt_tokens"]), request.full_text
        limit = 2 * (self.context + usual)  # of a text that is tokenised only to count what was taken away
        if kind == "internalised" or (len(text) > COUNT_CHUNK_CHARS and count(limit, text) > limit):
            return max(usual - round(adapter.card["query_prompt_tokens"]), 0)
        return max(len(self._adapter_ids(request.full_text, adapter, query="{query}")) - read, 0)

    def _check_chars(self, request: CompletionRequest, adapter: Adapter | None) -> None:
        """Refuse a text that is longer than the context and the adapter's whole prompt can be, before it is read."""
        tokens = self.context + (round(adapter.card["full_prompt_tokens"]) if adapter else 0)
        size, limit = len(request.full_text), MAX_CHARS_PER_TOKEN * tokens
        if size > limit:
            message = f"the request has {size} characters; the model's context and prompt allow at most {limit}"
            raise RefusedError(400, message, code="context_length_exceeded", param="messages")

    def _count_up_to(self, given_up: threading.Event, limit: int, text: str) -> int:
        """The tokens of `text` counted in pieces, until there are more than `limit` or nobody wants to know."""
        count = 0
        for at in range(0, len(text), COUNT_CHUNK_CHARS):
            if count > limit or given_up.is_set():
                break
            count += len(content_ids(self.tokenizer, text[at : at + COUNT_CHUNK_CHARS]))
        if given_up.is_set():
            raise RefusedError(499, "the client left")
        return count

    def _max_new_tokens(self, request: CompletionRequest, adapter: Adapter | None, prompt_tokens: int) -> int:
        """The token limit of the answer. One that was asked for is kept or refused, never silently lowered."""
        cap, asked = self.config.serve.max_new_tokens // request.choices, request.max_tokens
        room = self.context - prompt_tokens
        if (asked or 1) > cap:
            each = f" for each of {request.choices} choices" if request.choices > 1 else ""
            raise RefusedError(400, f"max_tokens is {asked}; the server allows at most {cap}{each}", param="max_tokens")
        if room < (asked or 1):
            raise self._too_long(str(prompt_tokens), asked or 1)
        return asked or min(2 * adapter.card["max_answer_tokens"] if adapter else cap, cap, room)

    def _too_long(self, prompt: str, asked: int) -> RefusedError:
        size = f"the prompt has {prompt} tokens and {asked} may be generated"
        message = f"{size}; the model's context holds {self.context}"
        return RefusedError(400, message, code="context_length_exceeded", param="messages")


def _text_event(text: str, detokenizer: IncrementalDetokenizer, logprobs: LogprobsBuffer | None) -> dict[str, Any]:
    event = {"text": text, "tokens": detokenizer.take_count()}
    return {**event, "logprobs": logprobs.take(detokenizer)} if logprobs else event
