"""Token ids back into text, as early as it is certain, and the log-probabilities that go with each piece."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pi_ray.protocols import Token

LEAST = -9999.0  # OpenAI's value for a token that is out of the question; JSON has no infinity


class TextStream:
    """Token ids in, text out as early as possible: the joined pieces equal `PromptEncoder.decode`, cut before the first stop string.

    A piece is held back while it may still change (half a character), may be trimmed (white space at the end), or may be the start of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.count = 0
        self.stopped = False
        self.seen = 0  # characters decoded so far, white space at the start included
        self.lead = 0  # of these, white space at the start, which is left out
        self._tokenizer = tokenizer
        self._stop = stop
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._ids: list[int] = []
        self._read = 0  # ids up to here are in the text
        self._context = 0  # decoding starts here, so that a token's leading space shows
        self._held = ""
        self._started = False

    @property
    def given(self) -> int:
        """Of the characters `seen`, those that have been handed out."""
        return self.seen - len(self._held)

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
        self._hold_back(self._decode(self._ids[self._context :])[len(known) :])
        self._cut()
        self._shorten(self._held.rstrip())
        rest, self._held = self._held, ""
        return rest if self._started else rest.lstrip()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _hold_back(self, text: str) -> None:
        self._held += text
        self.seen += len(text)

    def _shorten(self, held: str) -> None:
        self.seen -= len(self._held) - len(held)
        self._held = held

    def _release(self, text: str) -> str:
        self._hold_back(text)
        if self._cut():
            return ""
        certain = self._held[: max(0, len(self._held) - self._hold)].rstrip()
        piece = certain if self._started else certain.lstrip()
        self._held = self._held[len(certain) :]
        if piece and not self._started:
            self._started, self.lead = True, self.given - len(piece)
        return piece

    def _cut(self) -> bool:
        """Cut the held text before the first stop string in it."""
        places = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if places:
            self._shorten(self._held[: min(places)])
            self.stopped = True
        return bool(places)


class Logprobs:
    """The log-probabilities of tokens whose text is still held back. One entry: token, bytes, logprob, top (likeliest tokens), offset in the text."""

    def __init__(self, tokenizer: Any):
        self._name = cache(lambda token: spelled(tokenizer, token))
        self._waiting: list[tuple[int, Token]] = []

    def add(self, position: int, token: Token) -> None:
        """`position`: characters seen before the token."""
        self._waiting.append((position, token))

    def take(self, text: TextStream) -> list[dict[str, Any]]:
        """Entries of the tokens that began in text already handed out. What was cut off, and the end-of-sequence token, never come."""
        ready = [(position, token) for position, token in self._waiting if position < text.given]
        self._waiting = self._waiting[len(ready) :]
        return [{**self._entry(t.id, t.logprob), "top": [self._entry(*top) for top in t.top], "offset": max(position - text.lead, 0)} for position, t in ready]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        name, data = self._name(token)
        return {"token": name, "bytes": data, "logprob": LEAST if logprob is None else max(float(logprob), LEAST)}


def spelled(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """A token's text and its UTF-8 bytes. Part of a character is written bytes:\\xf0\\x9f; its bytes are None where the vocabulary does not tell them."""
    piece, text = tokenizer.convert_ids_to_tokens(token) or "", tokenizer.decode([token])
    if "\ufffd" not in text:
        text = f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text  # SentencePiece loses a first space
        return text, list(text.encode())
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # SentencePiece's byte
        data = [int(match[1], 16)]
    else:
        data = [_byte_alphabet().get(c, 0) for c in piece]
        if "\ufffd" not in bytes(data).decode(errors="replace"):
            return text, None
    return "bytes:" + "".join(f"\\x{b:02x}" for b in data), data


@cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (Radford et al. 2019): printable bytes stand for themselves, the others for characters from U+0100 on, in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
