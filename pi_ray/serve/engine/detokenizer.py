"""Incremental detokenization: ids back into text as early as is certain, with each piece's log-probabilities."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pi_ray.protocols import Token

MIN_LOGPROB = -9999.0  # OpenAI's value for a token that is out of the question; JSON has no infinity


class IncrementalDetokenizer:
    """Token ids in, text out as early as possible: the joined pieces equal `PromptEncoder.decode`, cut before the first
    stop string.

    Text is held back while it may still change (half a character), be trimmed (white space at the end) or be the start
    of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.count = 0  # tokens
        self.stopped = False
        self.decoded = 0  # characters decoded so far, white space at the start included
        self.leading = 0  # how many of these are white space at the start, which is left out
        self._tokenizer = tokenizer
        self._stop = stop
        self._max_partial_stop = max((len(s) for s in stop), default=1) - 1
        self._ids: list[int] = []
        self._read = 0  # ids up to here are in the text
        self._context = 0  # decoding starts here, so that a token's leading space shows
        self._held_back = ""
        self._started = False

    @property
    def released(self) -> int:
        """How many of the `decoded` characters have been handed out."""
        return self.decoded - len(self._held_back)

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
        """The text that was held back, once no more tokens come."""
        known = self._decode(self._ids[self._context : self._read])
        self._hold_back(self._decode(self._ids[self._context :])[len(known) :])
        self._cut_at_stop_string()
        self._shorten(self._held_back.rstrip())
        rest, self._held_back = self._held_back, ""
        return rest if self._started else rest.lstrip()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _hold_back(self, text: str) -> None:
        self._held_back += text
        self.decoded += len(text)

    def _shorten(self, held_back: str) -> None:
        self.decoded -= len(self._held_back) - len(held_back)
        self._held_back = held_back

    def _release(self, text: str) -> str:
        self._hold_back(text)
        if self._cut_at_stop_string():
            return ""
        certain = self._held_back[: max(0, len(self._held_back) - self._max_partial_stop)].rstrip()
        piece = certain if self._started else certain.lstrip()
        self._held_back = self._held_back[len(certain) :]
        if piece and not self._started:
            self._started, self.leading = True, self.released - len(piece)
        return piece

    def _cut_at_stop_string(self) -> bool:
        """Cut the held-back text before the first stop string in it."""
        places = [i for s in self._stop if (i := self._held_back.find(s)) >= 0]
        if places:
            self._shorten(self._held_back[: min(places)])
            self.stopped = True
        return bool(places)


class LogprobsBuffer:
    """Log-probabilities of tokens whose text is held back. Entries: token, bytes, logprob, top, offset in the text."""

    def __init__(self, tokenizer: Any):
        self._token_text = cache(lambda token: token_text(tokenizer, token))
        self._waiting: list[tuple[int, Token]] = []

    def add(self, position: int, token: Token) -> None:
        """`position`: characters decoded before the token."""
        self._waiting.append((position, token))

    def take(self, text: IncrementalDetokenizer) -> list[dict[str, Any]]:
        """Entries of tokens that begin in text already handed out. Text that was cut off has none."""
        ready = [(position, token) for position, token in self._waiting if position < text.released]
        self._waiting = self._waiting[len(ready) :]
        return [
            {
                **self._entry(token.id, token.logprob),
                "top": [self._entry(*top) for top in token.top],
                "offset": max(position - text.leading, 0),
            }
            for position, token in ready
        ]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, data = self._token_text(token)
        value = MIN_LOGPROB if logprob is None else max(float(logprob), MIN_LOGPROB)
        return {"token": text, "bytes": data, "logprob": value}


def token_text(tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
    """A token's text and UTF-8 bytes. Half a character is written bytes:\\xf0\\x9f; bytes are None where unknown."""
    piece, text = tokenizer.convert_ids_to_tokens(token) or "", tokenizer.decode([token])
    if "\ufffd" not in text:
        if piece.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece loses a first space
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
    """Character -> byte in byte-level BPE (Radford et al. 2019): printable bytes stay, others are U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
