"""Incremental detokenization: ids back into text as early as is certain, with each piece's log-probabilities."""

import re
from functools import cache, partial
from typing import Any

from pi_ray.protocols import Token

MIN_LOGPROB = -9999.0  # OpenAI's value for a token that is out of the question; JSON has no infinity


class IncrementalDetokenizer:
    """Ids in, text out as soon as it is certain: the pieces join to `PromptEncoder.decode`, cut before a stop string.

    Text is held back while it may still change (half a character), be trimmed (white space at the end) or be the start
    of a stop string. tokenizers' DecodeStream does the first alone and cannot be flushed.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.count = 0  # tokens
        self.stopped = False
        self.text = ""  # decoded so far, white space at the start included, up to a stop string
        self.released = 0  # how many of its characters have been handed out
        self.leading = 0  # how many of these are white space at the start, which is left out
        self._taken = 0  # tokens that `take_count` has told
        self._tokenizer = tokenizer
        self._stop = stop
        self._max_partial_stop = max((len(s) for s in stop), default=1) - 1
        self._ids: list[int] = []
        self._read = 0  # ids up to here are in the text
        self._context = 0  # decoding starts here, so that a token's leading space shows

    def push(self, token: int) -> str:
        """The text that is certain after this token; empty after the end."""
        if self.stopped:
            return ""
        self.count += 1
        if token == self._tokenizer.eos_token_id:
            self.stopped = True
            return ""
        self._ids.append(token)
        new = self._decode_new()
        if not new or new.endswith("\ufffd"):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(new, self._max_partial_stop)

    def finish(self) -> str:
        """The text that was held back, once no more tokens come."""
        return self._release(self._decode_new(), 0)

    def take_count(self) -> int:
        """Tokens that came since the last call."""
        new, self._taken = self.count - self._taken, self.count
        return new

    def _decode_new(self) -> str:
        """The text of the ids that are not yet in `text`."""
        decode = partial(self._tokenizer.decode, skip_special_tokens=True)
        known = decode(self._ids[self._context : self._read])
        return decode(self._ids[self._context :])[len(known) :]

    def _release(self, new: str, held_back: int) -> str:
        """Append `new` -> the piece that is certain when the last `held_back` characters may begin a stop string."""
        self.text += new
        places = [i for s in self._stop if (i := self.text.find(s, self.released)) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.stopped, held_back = True, 0
        piece = self.text[self.released : max(self.released, len(self.text) - held_back)].rstrip()
        is_first = not self.released
        self.released += len(piece)
        if is_first:
            self.leading = len(piece) - len(piece.lstrip())
        return piece.lstrip() if is_first else piece


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
        entries = []
        for position, token in ready:
            top = [self._entry(*likely) for likely in token.top]
            entries.append(self._entry(token.id, token.logprob, top=top, offset=max(position - text.leading, 0)))
        return entries

    def _entry(self, token: int, logprob: float | None, **rest: Any) -> dict[str, Any]:
        text, data = self._token_text(token)
        value = MIN_LOGPROB if logprob is None else max(float(logprob), MIN_LOGPROB)
        return {"token": text, "bytes": data, "logprob": value, **rest}


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
    """Character -> byte in byte-level BPE (Radford et al. 2019)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
