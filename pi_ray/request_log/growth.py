"""Growth: which requests repeat the turns of an earlier one and go on, as each turn of a conversation does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from pi_ray.request_log.request import Message, Request


class RequestKey(NamedTuple):
    """Hashes of a request: of its turns without the last answer and its values that vary, and of its turns with it."""

    asked: int
    answered: int


class Growth:
    """Knows the beginnings of all requests by their hashes.

    A request goes on with another one when it repeats its turns and its answer. Where also the values that vary are the
    same, such as a passage in the system message, the answer does not matter.
    """

    def __init__(self) -> None:
        self._begun = set[int]()

    def add(self, request: Request, values: Sequence[str] = ()) -> RequestKey:
        varying = int.from_bytes(blake2b(json.dumps(values).encode(), digest_size=8).digest()) if values else 0
        state, turns = blake2b(digest_size=8), 0
        for turn in request.asked:
            if turns:
                self._begun |= {turns, turns ^ varying}
            turns = _update(state, turn)
        answered = _update(state, request.turns[-1]) if len(request.asked) < len(request.turns) else turns
        return RequestKey(turns ^ varying, answered)

    def goes_on(self, key: RequestKey) -> bool:
        """Whether another request repeats that of this key and goes on."""
        return key.asked in self._begun or key.answered in self._begun


def longest(requests: Iterable[tuple[Request, Sequence[str]]]) -> list[Request]:
    """The request with the most turns of each conversation; requests come with their values that vary."""
    growth = Growth()
    keyed = [(growth.add(request, values), request) for request, values in requests]
    return list({key.asked: request for key, request in keyed if not growth.goes_on(key)}.values())


def _update(state: Any, turn: Message) -> int:
    """Take a turn into a running hash, white space around its text aside, and return the number that this is now."""
    plain = {**turn, "content": (turn["content"] or "").strip()}
    state.update(json.dumps(plain, sort_keys=True).encode() + b"\n")
    return int.from_bytes(state.digest())
