"""The way in of a request: which model answers it, the ids that this reads, and the limits of the answer."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pi_ray.config import PromptConfig, RunConfig
from pi_ray.conversation import check_messages, content_text, dump_messages, join_tools
from pi_ray.conversation.chat_template import CURE
from pi_ray.errors import ModelError
from pi_ray.prompt import PromptEncoder, content_ids
from pi_ray.serve.engine.grammar import answer_grammar
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.store.adapters import Adapter
from pi_ray.store.conversation_guard import ConversationGuard
from pi_ray.store.prompt_guard import EMPTY_GUARD, GuardResult, PromptGuard
from pi_ray.store.varying_values import put_before

QUERY_ONLY_MESSAGE = (
    "send exactly one message, of role 'user', with the query alone: the adapter was trained on that, and a system "
    "prompt or earlier turns mean nothing to it, unless they are those of the prompt that it has taken in"
)
TURNS_ONLY_MESSAGE = (
    "send the conversation without a system message and without tools: the adapter has taken them in, and this server "
    "does not recognise them (serve.drift_guard)"
)
FULL_PROMPT_MESSAGE = (
    "with pi_ray.full_prompt send what the adapter gets, without a system message, tools or few-shot turns: the server "
    "puts the adapter's whole prompt before it"
)
COUNT_CHUNK_CHARS = 16_384  # a longer text is first counted in pieces: a tokenizer can take seconds for one long word
MAX_CHARS_PER_TOKEN = 32  # by which a request's text is bounded before anything reads it; English has 4 or 5


class ReadPrompt(NamedTuple):
    """A request as the model that answers it gets it."""

    ids: list[int]
    max_new_tokens: int
    saved: int  # tokens that the model need not read, because the guard took them away or the client did not send them
    grammar: str  # that the answer follows; "": it is free
    may_call: bool  # whether the answer may hold tool calls
    functions: Sequence[str] | None  # that it may call; None: any, since nobody knows its tools


class PromptReader:
    """Reads requests for one base model with at most `context` tokens."""

    def __init__(self, config: RunConfig, tokenizer: Any, context: int):
        self.config, self.tokenizer, self.context = config, tokenizer, context
        added = tokenizer.added_tokens_decoder.items()
        self._added_tokens = {token.content: i for i, token in added if not token.special}
        self._encoder = lru_cache(maxsize=64)(lambda prompt: PromptEncoder(self.tokenizer, prompt))

    def prompt_ids(self, query: str, adapter: Adapter | None) -> list[int]:
        """The ids that the adapter's last phase trained on; for the base model the query in the run's prompt format."""
        if adapter is None:
            return self._encoder(self.config.prompt).encode(query)
        return self._adapter_ids(query, adapter, adapter.card["template"])

    def guard(self, request: CompletionRequest, adapter: Adapter | None, given_up: threading.Event) -> GuardResult:
        """Take away the prompt that came with the query or the conversation.

        Raises RefusedError for what the adapter was not trained on, and for a text that is too long to be read.
        """
        self._check_chars(request, adapter)
        guarded = self._guard(request, adapter)
        if guarded.kind == "drifted" and not request.base_allowed:
            cure = "send the query alone, or the prompt that the adapter was trained with"
            message = f"this key may not use the base model, which answers a changed prompt; {cure}"
            raise RefusedError(403, message, code="model_not_allowed", param="messages")
        keeps_system = guarded.kind == "drifted" and adapter is not None and adapter.is_conversational
        text = request.full_text if keeps_system or guarded.kind == "conversation" else guarded.text
        limit = 2 * self.context
        if len(text) > COUNT_CHUNK_CHARS and (tokens := self._count_up_to(given_up, limit, text)) > limit:
            raise self._too_long(f"more than {tokens - 1}", 1)
        return guarded

    def read(
        self, request: CompletionRequest, guarded: GuardResult, adapter: Adapter | None, given_up: threading.Event
    ) -> ReadPrompt:
        """Tokenise what the guard left. Raises RefusedError for what the model or the answer's format does not take."""
        trained_to_call = adapter is not None and adapter.is_conversational and guarded.kind != "drifted"
        known = adapter.guard.tools if adapter and isinstance(adapter.guard, ConversationGuard) else None
        tools = request.tools or (known if trained_to_call else ()) or ()
        if request.answer.tool_choice == "required":
            _check_tool_choice(request.answer.function, tools)
        grammar = answer_grammar(request.answer, tools, self._added_tokens)
        ids = self._encode(request, guarded, adapter)
        limit = self._max_new_tokens(request, adapter, len(ids))
        saved = self._saved_tokens(request, adapter, guarded.kind, len(ids), given_up)
        functions = None if trained_to_call and known is None else [tool["function"]["name"] for tool in tools]
        may_call = functions != [] and request.answer.tool_choice != "none"
        return ReadPrompt(ids, limit, saved, grammar, may_call, functions)

    def _guard(self, request: CompletionRequest, adapter: Adapter | None) -> GuardResult:
        if adapter and adapter.is_conversational:
            return self._guard_conversation(request, adapter)
        if adapter and request.uses_tools:
            param, message = "tools" if request.tools else "messages", f"{QUERY_ONLY_MESSAGE}; it knows no tools either"
            raise RefusedError(400, message, param=param)
        if request.full_prompt:
            if request.history:
                raise RefusedError(400, FULL_PROMPT_MESSAGE, param="messages")
            return GuardResult("full", request.query)
        if adapter is None:
            kind = "conversation" if request.history or request.uses_tools else "internalised"
            return GuardResult(kind, request.query)
        known = adapter.guard if self.config.serve.drift_guard else None
        guard = known if isinstance(known, PromptGuard) else EMPTY_GUARD
        system = "\n\n".join(text for role, text in request.history if role == "system")
        turns = [(role, text) for role, text in request.history if role != "system"]
        guarded = guard.inspect(system, request.query, turns)
        if guarded.kind == "unknown":
            raise RefusedError(400, QUERY_ONLY_MESSAGE, param="messages")
        if guarded.kind == "stripped" and not guarded.text:
            raise RefusedError(400, "there is no query behind the template", param="messages")
        return guarded

    def _guard_conversation(self, request: CompletionRequest, adapter: Adapter) -> GuardResult:
        """The same for an adapter that was trained on conversations; `text` is that without its system message."""
        system, messages = _split_conversation(request)
        text = dump_messages(messages)
        if request.full_prompt:
            if system or request.tools:
                raise RefusedError(400, FULL_PROMPT_MESSAGE, param="tools" if request.tools else "messages")
            return GuardResult("full", text)
        if not system and not request.tools:
            return GuardResult("internalised", text)
        if not (isinstance(adapter.guard, ConversationGuard) and self.config.serve.drift_guard):
            raise RefusedError(400, TURNS_ONLY_MESSAGE, param="messages")
        kind, values = adapter.guard.inspect(system, request.tools)
        if values:
            first, *others = messages
            content = put_before(values, content_text(first["content"]))
            text = dump_messages([{**first, "content": content}, *others])
        return GuardResult(kind, text)

    def _encode(self, request: CompletionRequest, guarded: GuardResult, adapter: Adapter | None) -> list[int]:
        if guarded.kind == "conversation":
            return self._base_ids(request)
        if guarded.kind == "full":
            if adapter is None or adapter.guard is None:
                needs = "needs as model an adapter that was published with its prompt; publish it again"
                raise RefusedError(400, f"pi_ray.full_prompt {needs}", param="pi_ray")
            return self._adapter_ids(guarded.text, adapter, adapter.guard.template)
        if adapter and guarded.kind == "drifted":
            if adapter.is_conversational:
                system, _ = request.split_conversation()
                return self._adapter_ids(guarded.text, adapter, join_tools(system, request.tools))
            return self._adapter_ids(guarded.text, adapter, query="{query}")
        return self.prompt_ids(guarded.text, adapter)

    def _base_ids(self, request: CompletionRequest) -> list[int]:
        """Ids of a conversation for the base model, in its own chat template, which has the tools where it can."""
        try:
            if not request.uses_tools:
                texts = [*request.history, ("user", request.query)]
                return self._encoder(PromptConfig(chat="none")).conversation(texts)
            system, messages = _split_conversation(request)
            encoder = self._encoder(PromptConfig(chat="model+system", conversation=True))
            return encoder.encode(dump_messages(messages), join_tools(system, request.tools))
        except ModelError as error:
            reason = str(error).removesuffix(f"; {CURE}")  # the cure is one for training
            raise RefusedError(400, reason, param="messages") from error

    def _adapter_ids(self, text: str, adapter: Adapter, template: str = "", **changed: str) -> list[int]:
        """Ids of `text` in the adapter's prompt format; `query="{query}"` for a whole prompt as a client words it."""
        return self._encoder(PromptConfig(**{**adapter.card["prompt"], **changed})).encode(text, template)

    def _saved_tokens(
        self, request: CompletionRequest, adapter: Adapter | None, kind: str, read: int, given_up: threading.Event
    ) -> int:
        """Tokens that the model need not read, because the guard took them away or the client did not send them."""
        if adapter is None or kind == "full" or (adapter.is_conversational and kind == "drifted"):
            return 0
        usual = round(adapter.card["full_prompt_tokens"])
        by_card = max(usual - round(adapter.card["query_prompt_tokens"]), 0)
        if kind == "internalised" or adapter.is_conversational:
            return by_card
        text, limit = request.full_text, 2 * (self.context + usual)  # tokenised only to count what was taken away
        if len(text) > COUNT_CHUNK_CHARS and self._count_up_to(given_up, limit, text) > limit:
            return by_card
        return max(len(self._adapter_ids(text, adapter, query="{query}")) - read, 0)

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


def _split_conversation(request: CompletionRequest) -> tuple[str, list[dict[str, Any]]]:
    """The system message, and the other messages, checked. Raises RefusedError."""
    try:
        system, messages = request.split_conversation()
        check_messages(messages)
    except ValueError as error:
        raise RefusedError(400, str(error), param="messages") from error
    return system, messages


def _check_tool_choice(function: str, tools: Sequence[dict[str, Any]]) -> None:
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise RefusedError(400, "tool_choice needs tools", param="tool_choice")
    if function and function not in names:
        raise RefusedError(400, f"tool_choice names {function[:80]!r}, which is not in tools", param="tool_choice")
