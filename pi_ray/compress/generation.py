"""Compression by a chat model that is told to remove words, the paper's baseline "GPT-4 Generation" (5.1, Figure 4 in C.1).

The instruction names no rate and models keep to none, so the model is asked again with its own answer until it is short enough. Between
two answers, the words that went in the last step come back evenly spread until the rate is met; below what the model keeps nothing is
removed, and the result says so. Only words of the text count, in order: what the model adds or rewrites is dropped. Text is sent in
chunks, because models compress long text too hard (Pan et al. 2024, arXiv 2403.12968, section 3.1). Each answer is cached, so it is paid
for once.
"""

from __future__ import annotations

import os
import string
from dataclasses import dataclass
from functools import lru_cache

from pi_ray.compress import cache, words
from pi_ray.compress.ranking import CACHED_TEXTS, keep_best
from pi_ray.config import ClosedConfig, CompressConfig
from pi_ray.errors import ConfigError, MissingExtraError, ModelError, TrainingError
from pi_ray.hosted.client import Service
from pi_ray.run.artifact import digest

INSTRUCTION = """\
Compress the given text to short expressions, and make sure you can reconstruct it as close as possible to the original.
Unlike the usual text compression, I need you to comply with the 5 conditions below:
+ You can ONLY remove unimportant words.
+ Do not reorder the original words.
+ Do not change the original words.
+ Do not use abbreviations or emojis.
+ Do not add new words or symbols.
Compress the origin aggressively by removing words only. Compress the origin as short as you can, while retaining as much information as possible. \
If you understand, please compress the following text: {text}
The compressed text is:"""
CHUNK_WORDS = 350  # about 512 tokens
ROUNDS = 6
LEAST = 0.03  # a round that removes less of what there was is the last
OWN_WORDS = 0.5  # an answer of which fewer words stand in the text is no compression of it


@dataclass
class RemovalState:
    """A text being compressed: its words, after how many rounds each went (0: it is still there), and whether the model removes no more."""

    pieces: list[words.Span]
    gone: list[int]
    rounds: int = 0
    done: bool = False


class GenerationCompressor:
    """Compressor "generation". `config.model` is asked at `config.base_url`, OpenAI's API when that is empty, with the key in `config.api_key_env`.

    Raises MissingExtraError without the openai package, ConfigError without a key, ModelError when the model cannot be asked.
    """

    def __init__(self, config: CompressConfig):
        self.config = config
        self.service = _service(config)
        self._progress = lru_cache(CACHED_TEXTS)(_begin)

    def compress(self, text: str, rate: float) -> str:
        state = self._progress(text)
        sizes = [end - start + 1 for start, end in state.pieces]
        total = sum(sizes)
        while not state.done and _left(state, sizes) > rate * total:
            self._ask_again(text, state)
        kept = keep_best(_scores(state), sizes, max(rate, _left(state, sizes) / max(total, 1)))
        return words.join_words(text, state.pieces, kept)

    def _ask_again(self, text: str, state: RemovalState) -> None:
        """One round: the words that are left, chunk by chunk, and those of them that the model keeps."""
        left = [i for i, round_ in enumerate(state.gone) if not round_]
        state.rounds += 1
        for chunk in split_chunks(text, state.pieces, left):
            inside = set(chunk)
            part = words.join_words(text, state.pieces, [i in inside for i in range(len(state.pieces))])
            kept = self._kept([text[a:b] for a, b in (state.pieces[i] for i in chunk)], part, first=state.rounds == 1)
            for i, stays in zip(chunk, kept, strict=True):
                state.gone[i] = 0 if stays else state.rounds
        still = sum(not round_ for round_ in state.gone)
        state.done = state.rounds == ROUNDS or still > (1 - LEAST) * len(left) or not still

    def _kept(self, original: list[str], text: str, first: bool) -> list[bool]:
        """Which words of one chunk the model keeps: all of them when it has no more to remove. Raises ModelError when it does something else at `first`."""
        prompt = INSTRUCTION.replace("{text}", text)
        key = digest(["chat", self.config.base_url, self.config.model, prompt])
        known = cache.load_result(key)
        said = self._ask(prompt, len(text) // 2 + 64) if known is None else known
        answer = [_bare(w) for w in said.split()]
        kept = words.find_kept_words([_bare(w) for w in original], answer)
        refused = not answer or sum(kept) < OWN_WORDS * len(answer)
        if refused and first:
            raise ModelError(f"{self.config.model} did not compress the text but answered {said[:80]!r}; compress.model must follow instructions")
        if known is None:
            cache.store_result(key, said)
        return [True] * len(original) if refused else kept

    def _ask(self, prompt: str, limit: int) -> str:
        try:
            return self.service.chat(self.config.model, prompt, limit).text
        except TrainingError as error:
            raise ModelError(f"compress.name generation: {error}") from None


def split_chunks(text: str, pieces: list[words.Span], left: list[int]) -> list[list[int]]:
    """The words `left` in runs of at most CHUNK_WORDS, each ending with a sentence or a line where one ends in its second half."""
    found = []
    while left:
        run = left[:CHUNK_WORDS]
        if len(run) < len(left):
            half = range(len(run) // 2, len(run))
            ends = [n for n in half if text[pieces[run[n]][1] - 1] == "." or "\n" in text[pieces[run[n]][1] : pieces[left[n + 1]][0]]]
            run = run[: ends[-1] + 1] if ends else run
        found.append(run)
        left = left[len(run) :]
    return found


def _service(config: CompressConfig) -> Service:
    if not os.environ.get(config.api_key_env, "").strip():
        raise ConfigError(
            f"compress.api_key_env: the environment variable {config.api_key_env} is empty; put the chat model's key there (any word for one that wants none)"
        )
    try:
        return Service(ClosedConfig(base_url=config.base_url, model=config.model, api_key_env=config.api_key_env))
    except MissingExtraError:
        raise MissingExtraError("compress.name 'generation' needs: pip install 'pi-ray[closed]'") from None


def _begin(text: str) -> RemovalState:
    pieces = words.word_spans(text)
    return RemovalState(pieces, [0] * len(pieces))


def _left(state: RemovalState, sizes: list[int]) -> int:
    return sum(size for size, round_ in zip(sizes, state.gone, strict=True) if not round_)


def _scores(state: RemovalState) -> list[float]:
    """Words that stayed longer score higher; those that went in one round are ordered so that any first few of them are spread evenly."""
    scores = [float(round_ or state.rounds + 1) for round_ in state.gone]
    for round_ in range(1, state.rounds + 1):
        together = [i for i, r in enumerate(state.gone) if r == round_]
        for n, i in enumerate(together):
            scores[i] += 0.9 - 0.9 * _spread(n)
    return scores


def _spread(n: int) -> float:
    """The n-th number of van der Corput's sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{n:b}"[::-1], 2) / 2 ** n.bit_length() if n else 0.0


def _bare(word: str) -> str:
    """A word as it is compared: models move commas and change capitals."""
    return word.strip(string.punctuation).casefold() or word
