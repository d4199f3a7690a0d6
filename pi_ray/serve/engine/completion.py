"""One completion from query to text: which adapter, which prompt ids, which limits, and token ids back into text piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from pi_ray.config import PromptConfig, RunConfig
from pi_ray.errors import AdapterError, ModelError, PiRayError
from pi_ray.models import base_name
from pi_ray.prompt import PromptEncoder, content_ids
from pi_ray.protocols import GenerationRequest
from pi_ray.serve.engine.conversation import ConversationEncoder
from pi_ray.serve.engine.detokenizer import Logprobs, TextStream
from pi_ray.store.adapters import Adapter, AdapterStore, StoreUnavailableError, UnknownAdapterError
from pi_ray.store.prompt_guard import NOTHING, Seen

log = logging.getLogger("ray.serve")
ONE_MESSAGE = (
    "send exactly one message, of role 'user', with the query alone: the adapter was trained on that, and a system prompt or earlier turns mean nothing to it, "
    "unless they are those of the prompt that it has taken in"
)
COUNTED_AT_ONCE = 16_384  # characters; a longer text is counted in pieces first, since a tokenizer can take seconds for one long word


@dataclass(frozen=True)
class Ask:
    """A valid request for one answer, without its HTTP clothes.

    `max_tokens` None: twice the longest answer that the adapter was trained on. `before`: (role, text) of the messages before the query, with roles
    system, user and assistant. `logprobs`: how many of the likeliest tokens to tell beside each one; None for no log-probabilities. `choices` answers
    share the server's token limit. `ticket` decides whether a version on trial answers: equal tickets meet the same version. `full_prompt`: for
    comparison, the base model answers, with the adapter's whole template before the query.
    """

    model: str
    query: str
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    before: tuple[tuple[str, str], ...] = ()
    logprobs: int | None = None
    choices: int = 1
    ticket: str = ""
    full_prompt: bool = False

    @property
    def system(self) -> str:
        """What the system messages say."""
        return "\n\n".join(text for role, text in self.before if role == "system")

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Messages before the query that are no system messages."""
        return [(role, text) for role, text in self.before if role != "system"]

    @property
    def whole(self) -> str:
        """All that the client sent."""
        return "\n\n".join(text for text in (*(text for _, text in self.before), self.query) if text)


class RefusedError(Exception):
    """A request that cannot be answered: HTTP status, and OpenAI's `type`, `code` and `param`. Survives pickling between processes."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None):
        super().__init__(status, message, kind, code, param)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param


def adapter_of(model: str, base: str) -> str | None:
    """The adapter that `model` asks for: "x" and "<base>:x" give "x", the base's own name gives None. The result is not checked yet."""
    name = base_name(base)
    return None if model == name else model.removeprefix(f"{name}:")


def served(config: RunConfig, store: AdapterStore) -> list[str]:
    """What clients may ask for: the base model and the adapters; or, where one is merged into the base, that one alone."""
    return [config.serve.merge.partition("@")[0]] if config.serve.merge else [base_name(config.model.base), *store.names()]


class Completer:
    """Answers Asks with one engine and one store."""

    def __init__(self, config: RunConfig, engine: Any, tokenizer: Any, context: int):
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.context = context
        self.store = AdapterStore(config.store, config.model)
        self.merged: Adapter | None = None
        self._told = ""
        self._encoder = lru_cache(maxsize=64)(lambda prompt: PromptEncoder(tokenizer, prompt))

    @cached_property
    def _conversations(self) -> ConversationEncoder:
        return ConversationEncoder(self.tokenizer)

    def merge(self, spec: str) -> None:
        """Before the first request: have the engine add this adapter into the base weights. From now on it alone is served, whatever is released."""
        adapter = self.store.open(spec)
        self.engine.merge(str(adapter.path))
        self.merged = adapter

    def prompt_ids(self, query: str, adapter: Adapter | None) -> list[int]:
        """Exactly the ids that the adapter's last phase trained on; for the bare base model the query in the run's prompt format."""
        if adapter is None:
            return self._encoder(self.config.prompt).encode(query).ids
        return self._encoder(PromptConfig(**adapter.card["prompt"])).encode(query, adapter.card["template"]).ids

    async def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """First {"model", "fingerprint", "adapter", "prompt", "prompt_tokens", "saved"}, then {"text"} pieces, last {"finish", "completion_tokens"}.

        Raises RefusedError. "fingerprint" is what answers, "adapter" what was asked for, or "". "prompt" is what was done to it: drift.Seen's kind, "full", or
        "base". Pieces have "logprobs", entries of text.Logprobs, when these were asked for.
        """
        start, request = await asyncio.to_thread(self._request, ask)
        yield start
        text, marks = TextStream(self.tokenizer, ask.stop), None if ask.logprobs is None else Logprobs(self.tokenizer)
        try:
            async with aclosing(self.engine.generate(request)) as tokens:
                async for token in tokens:
                    if marks:
                        marks.add(text.seen, token)
                    if piece := text.push(token.id):
                        yield _piece(piece, text, marks)
        except AdapterError as error:
            raise refused(error) from error
        if piece := text.finish():
            yield _piece(piece, text, marks)
        length = text.count >= request.max_new_tokens and not text.stopped
        yield {"finish": "length" if length else "stop", "completion_tokens": text.count}

    def _request(self, ask: Ask) -> tuple[dict[str, Any], GenerationRequest]:
        """Blocking: reads and verifies the adapter the first time, and tokenises."""
        name = adapter_of(ask.model, self.config.model.base)
        try:
            adapter = None if name is None else self._open(name, ask.ticket)
            seen = Seen("full", ask.query) if ask.full_prompt else self._look(ask, adapter)
            self._check_size(ask.whole if seen.kind == "conversation" else seen.text)
            answers = None if seen.kind in ("drifted", "full") else adapter  # a template that the adapter does not know is read by the base model
            if self.merged and answers != self.merged:
                raise AdapterError(
                    f"this server has {self.merged.name}@{self.merged.version} merged into the base model (serve.merge) and serves it alone: no other adapter or "
                    "version, and not the bare base, which would answer a full or changed prompt"
                )
            ids = self._ids(ask, seen, adapter)
        except PiRayError as error:
            raise refused(error) from error
        limit = self._limit(ask, adapter, len(ids))
        asked = f"{adapter.name}@{adapter.version}" if adapter else ""
        start = {
            "model": ask.model,
            "fingerprint": asked if answers else base_name(self.config.model.base),
            "adapter": asked,
            "prompt": seen.kind if adapter else "base",
            "prompt_tokens": len(ids),
            "saved": self._saved(ask, adapter, seen, len(ids)),
        }
        folder = str(adapter.path) if answers else ""
        return start, GenerationRequest(ids, limit, folder, ask.temperature, ask.top_p, ask.seed, ask.stop, ask.logprobs)

    def _open(self, name: str, ticket: str) -> Adapter:
        """The adapter of that name. The merged one answers to its bare name even when the store means another version by it by now; the log says so once."""
        if self.merged is None or name != self.merged.name:
            return self.store.open(name, ticket)
        with suppress(AdapterError):  # also while the store is out of reach
            _, version = self.store.resolve(name)
            if version not in (self.merged.version, self._told):
                self._told = version
                log.warning("%s@%s is merged into the base model and goes on answering; deploy again to have %s", name, self.merged.version, version)
        return self.merged

    def _look(self, ask: Ask, adapter: Adapter | None) -> Seen:
        """The query without the prompt that it came with. Raises RefusedError for messages before it that are not of the adapter's prompt."""
        if adapter is None:
            return Seen("conversation" if ask.before else "internalised", ask.query)
        guard = adapter.guard if adapter.guard and self.config.serve.drift_guard else NOTHING
        seen = guard.look(ask.system, ask.query, ask.turns)
        if seen.kind == "unknown":
            raise RefusedError(400, ONE_MESSAGE, param="messages")
        if seen.kind == "stripped" and not seen.text:
            raise RefusedError(400, "there is no query behind the template", param="messages")
        return seen

    def _ids(self, ask: Ask, seen: Seen, adapter: Adapter | None) -> list[int]:
        if seen.kind == "conversation":
            try:
                return self._conversations.conversation([*ask.before, ("user", ask.query)])
            except ModelError as error:
                raise RefusedError(400, str(error), param="messages") from error
        if seen.kind == "drifted":
            return self._raw_ids(seen.text, adapter)
        if seen.kind == "full":
            if adapter is None or adapter.guard is None:
                raise RefusedError(400, "pi_ray.full_prompt needs as model an adapter that was published with its prompt; publish it again", param="pi_ray")
            return self._encoder(PromptConfig(**adapter.card["prompt"])).encode(seen.text, adapter.guard.template).ids
        return self.prompt_ids(seen.text, adapter)

    def _raw_ids(self, text: str, adapter: Adapter) -> list[int]:
        """Ids of a whole prompt as a client words it, in the chat format of the adapter."""
        return self._encoder(PromptConfig(**adapter.card["prompt"]).model_copy(update={"query": "{query}"})).encode(text).ids

    def _saved(self, ask: Ask, adapter: Adapter | None, seen: Seen, sent: int) -> int:
        """Tokens that the model did not have to read: those of what was taken away here, or else those that the client need not send (the adapter's card)."""
        if adapter is None or seen.kind == "full":
            return 0
        if seen.kind == "internalised":
            return max(round(adapter.card["full_prompt_tokens"] - adapter.card["query_prompt_tokens"]), 0)
        return max(len(self._raw_ids(ask.whole, adapter)) - sent, 0)

    def _check_size(self, text: str) -> None:
        """Refuse what is far beyond the context before it is tokenised whole."""
        count = 0
        for at in range(0, len(text) if len(text) > COUNTED_AT_ONCE else 0, COUNTED_AT_ONCE):
            count += len(content_ids(self.tokenizer, text[at : at + COUNTED_AT_ONCE]))
            if count > 2 * self.context:
                raise self._too_long(f"more than {count - 1}", 1)

    def _limit(self, ask: Ask, adapter: Adapter | None, prompt: int) -> int:
        """max_new_tokens. A limit that was asked for is kept or refused, never silently lowered."""
        cap, asked, room = self.config.serve.max_new_tokens // ask.choices, ask.max_tokens, self.context - prompt
        if (asked or 1) > cap:
            each = f" for each of {ask.choices} choices" if ask.choices > 1 else ""
            raise RefusedError(400, f"max_tokens is {asked}; this server allows at most {cap}{each}", param="max_tokens")
        if room < (asked or 1):
            raise self._too_long(str(prompt), asked or 1)
        return asked or min(2 * adapter.card["max_answer_tokens"] if adapter else cap, cap, room)

    def _too_long(self, prompt: str, asked: int) -> RefusedError:
        message = f"the prompt has {prompt} tokens and {asked} may be generated; the model's context holds {self.context}"
        return RefusedError(400, message, code="context_length_exceeded", param="messages")


def several(ask: Ask, n: int) -> list[Ask]:
    """The ask for each of `n` answers to a prompt. A seed gives each its own, so that they differ and come again."""
    return [ask if ask.seed is None else replace(ask, seed=(ask.seed + i + 2**63) % 2**64 - 2**63) for i in range(n)]


def _piece(text: str, stream: TextStream, marks: Logprobs | None) -> dict[str, Any]:
    return {"text": text, "logprobs": marks.take(stream)} if marks else {"text": text}


def refused(error: PiRayError) -> RefusedError:
    """Unknown adapter: 404. A store out of reach: 503. An adapter that fails verification, or a prompt format that the base model does not allow: 422."""
    if isinstance(error, UnknownAdapterError):
        return RefusedError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, StoreUnavailableError):
        return RefusedError(503, str(error), "server_error", "store_unavailable")
    code = "adapter_refused" if isinstance(error, AdapterError) else "model_refused"
    return RefusedError(422, str(error), code=code, param="model")
