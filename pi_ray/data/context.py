"""Conversations within the model's context: a longer one loses its oldest turns, those after the first user's message.

The whole template stands before every conversation, as in the first phase, so that all phases and columns see the same
rows. The first turn that is kept answers what was cut, so it is fed and not learned (weight 0). A turn of which nothing
is left but the first user's message and the latest exchange is left out if that is still too long.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.conversation import dump_messages, load_messages
from pi_ray.errors import DataError, ModelError
from pi_ray.models import context_length
from pi_ray.prompt import PromptEncoder, Template
from pi_ray.protocols import Reject, Row
from pi_ray.retrieve.neighbours import normalised


class ConversationContext:
    """Cuts conversations to the tokens that are left behind a template, and counts what it cut. Counts too which
    turns are both trained and evaluated.

    Raises DataError where the template leaves no tokens.
    """

    def __init__(self, config: RunConfig, encoder: PromptEncoder, template: Template):
        self.encoder, own = encoder, context_length(config.model)
        self.context = min(own, config.prompt.context or own)
        self.template = len(encoder.prefix(template.text))
        self.room = self.context - self.template
        self.is_own_template, self.all_turns = config.prompt.chat != "chatml", config.task.learn == "all"
        self.rows = self.cut = self.messages = self.left_out = 0
        self.trained, self.evaluated = set[bytes](), list[bytes]()  # digests of what stands before turns
        if self.room <= 0:
            limit, cure = ("the model's context", "take a model with a longer one")
            if self.context < own:
                limit, cure = "prompt.context", "raise it"
            raise DataError(f"system message and tools have {self.template:,} tokens, and {limit} is "
                            f"{self.context:,}; {cure}, or shorten them")

    def fit(self, row: Row | Reject) -> Row | Reject | None:
        """The row with as many of its conversation's messages as fit with its answer; None where too few do. A Reject
        where the chat template does not take it.
        """
        if isinstance(row, Reject):
            return row
        try:
            fitted = self._cut(row)
            if fitted and self.is_own_template:
                self._check(fitted)
        except ModelError as error:
            return Reject(row.id, 0, str(error))
        self.rows, self.left_out = self.rows + 1, self.left_out + (fitted is None)
        return fitted

    def _check(self, row: Row) -> None:
        """Raise ModelError unless the row's ids can be made."""
        if self.all_turns and row.answer:
            self.encoder.all_turns(row.query, row.answer)
            return
        self.encoder.row(row.query)
        if row.answer:
            self.encoder.answer(row.answer)

    def _cut(self, row: Row) -> Row | None:
        if len(row.query.encode()) + len(row.answer.encode()) <= self.room:  # a token is at least a byte
            return row
        messages, answer = load_messages(row.query), len(self.encoder.answer(row.answer))

        def is_short(kept: Sequence[dict[str, Any]]) -> bool:
            return len(self.encoder.row(dump_messages(kept))) + answer <= self.room

        if is_short(messages):
            return row
        starts = [i for i, message in enumerate(messages) if i > 1 and message["role"] == "assistant"]
        place = bisect_left(starts, True, key=lambda i: is_short([messages[0], *messages[i:]]))
        if place == len(starts):
            return None
        self.cut, self.messages = self.cut + 1, self.messages + starts[place] - 1
        first, *rest = messages[starts[place] :]
        return replace(row, query=dump_messages([messages[0], {**first, "weight": 0}, *rest]))

    def remember(self, row: Row | Reject, split: str) -> None:
        """Take note of the turns of a row that is used, as it was before it was cut."""
        if isinstance(row, Reject):
            return
        *earlier, last = _asked(row.query)
        if split == "train":
            self.trained.update([last, *earlier] if self.all_turns else [last])
        elif split in ("dev", "test"):
            self.evaluated.append(last)

    def notes(self) -> list[str]:
        """Say what was cut, and what is trained though it is evaluated."""
        repeated = sum(asked in self.trained for asked in self.evaluated)
        alike = (f"{repeated} of {len(self.evaluated)} turns of dev and test follow the same messages as one of train, "
                 "so their scores may measure memory")
        room = f"{self.room:,} tokens that the template leaves of the model's context"
        cut = (f"{self.cut} of {self.rows} rows cut to the {room}: {self.messages:,} messages left out, the oldest "
               "after the first one")
        too_long = (f"{self.left_out} of {self.rows} rows left out, because even their first message and their latest "
                    f"exchange alone are longer than the {room}")
        return [cut] * bool(self.cut) + [too_long] * bool(self.left_out) + [alike] * bool(repeated)


def _asked(query: str) -> list[bytes]:
    """A digest of the messages before each learned turn of a conversation, the answer's last; without ids of calls."""
    digest, found = blake2b(digest_size=16), []
    for message in load_messages(query):
        if message["role"] == "assistant" and message.get("weight") != 0:
            found.append(digest.digest())
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        digest.update(normalised(json.dumps([message["role"], message.get("content"), functions])).encode())
    return [*found, digest.digest()]
