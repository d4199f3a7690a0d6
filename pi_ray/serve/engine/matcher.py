"""Matchers: a grammar compiled for a tokenizer, and where one sequence's answer is in it -> which tokens may follow."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from pi_ray.serve.engine.grammar import LIMITS
from pi_ray.serve.engine.refusal import RefusedError

CACHED_GRAMMARS = 64  # of a replica, the most recently used ones


class MatcherFactory:
    """Makes the matcher of each sequence; grammars are compiled once, bad ones too. Called in a thread of its own.

    A grammar can take seconds, and the first one a second for the tokenizer: one thread holds up other grammars alone.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled = lru_cache(CACHED_GRAMMARS)(self._compile)

    def matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of an answer. Raises RefusedError for a grammar that is too complex."""
        with self._lock:  # those who wait for the same grammar find it compiled
            compiled = self._compiled(grammar)
            if compiled.is_error():
                raise grammar_error(compiled)
            return compiled.deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = from_tokenizer(self._tokenizer)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LIMITS)
        matcher.compute_bitmask()  # the first one takes milliseconds, and copies keep what it found
        return matcher


def take_token(matcher: LLMatcher, token: int) -> RefusedError | None:
    """Go on by the token that was chosen -> the refusal where the matcher failed, now or in making the mask."""
    is_taken = matcher.consume_token(token)
    return None if is_taken and not matcher.is_error() else grammar_error(matcher)


def grammar_error(matcher: LLMatcher) -> RefusedError:
    """The refusal of a grammar in which the matcher went past one of LIMITS."""
    reason = matcher.get_error().splitlines()[0]
    return RefusedError(400, f"the JSON schemas of this request are too complex: {reason}", code="invalid_json_schema")


def mask_logits(logits: torch.Tensor, matchers: Sequence[LLMatcher | None]) -> torch.Tensor:
    """Logits (sequences, vocabulary) with -inf for tokens that a sequence's matcher does not allow.

    The end-of-sequence token is allowed only where the answer may end. Rows without a matcher are as they were.
    """
    rows = [i for i, matcher in enumerate(matchers) if matcher]
    if not rows:
        return logits
    size = logits.shape[1]
    bits = [np.frombuffer(matcher.compute_bitmask(), np.uint8) for matcher in matchers if matcher]
    allowed = np.unpackbits(np.stack(bits), axis=1, count=size, bitorder="little")
    masked = logits.clone()
    masked[rows] = logits[rows].masked_fill(torch.from_numpy(allowed == 0).to(logits.device), float("-inf"))
    return masked
