"""Compression by a chat model that removes words, the paper's baseline "GPT-4 Generation" (5.1, Figure 4 in C.1).

The instruction names no rate and models keep to none, so the model is asked again with its own answer until it is short
enough. The words removed in the last round then come back, evenly spread, until the rate is met. Only words of the text
count, in order. Text is sent in chunks, because models compress long text too hard (Pan et al. 2024, arXiv 2403.12968,
section 3.1). Each answer is cached, so it is paid for once.
"""

import string
from functools import lru_cache

from pi_ray.compress import cache, words
from pi_ray.compress.ranking import CACHED_TEXTS, keep_best
from pi_ray.config import ClosedConfig, CompressConfig
from pi_ray.errors import ModelError, TrainingError
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
Compress the origin aggressively by removing words only. \
Compress the origin as short as you can, while retaining as much information as possible. \
If you understand, please compress the following text: {text}
The compressed text is:"""
CHUNK_WORDS = 350  # about 512 tokens
ROUNDS = 6
MIN_REMOVED = 0.03  # a round that removes less of the remaining words is the last
MIN_ORIGINAL = 0.5  # an answer with fewer of its words in the text is not a compression of it


class RemovalState:
    """A text that the model compresses: its words, and the round in which each one was removed, 0 while it remains."""

    def __init__(self, text: str):
        self.pieces = words.word_spans(text)
        self.removed_in = [0] * len(self.pieces)
        self.rounds = 0
        self.done = False  # the model removes no more

    def remaining(self) -> list[int]:
        return [i for i, round_ in enumerate(self.removed_in) if not round_]

    def scores(self) -> list[float]:
        """Higher for words that remained longer; of one round's words, any first few by score are spread evenly."""
        scores = [float(round_ or self.rounds + 1) for round_ in self.removed_in]
        for round_ in range(1, self.rounds + 1):
            for n, i in enumerate(i for i, r in enumerate(self.removed_in) if r == round_):
                scores[i] += 0.9 - 0.9 * _van_der_corput(n)
        return scores


class GenerationCompressor:
    """Compressor "generation": asks `config.model` at `config.base_url` (empty: OpenAI's API).

    Raises MissingExtraError without the openai package, ConfigError without a key, ModelError when the model fails.
    """

    def __init__(self, config: CompressConfig):
        settings = ClosedConfig(base_url=config.base_url, model=config.model, api_key_env=config.api_key_env)
        self.service = Service(settings, chosen_by="compress.name 'generation'", block="compress")
        self.config = config
        self._state = lru_cache(CACHED_TEXTS)(RemovalState)

    def compress(self, text: str, rate: float) -> str:
        state = self._state(text)
        sizes = [end - start + 1 for start, end in state.pieces]
        total = sum(sizes)
        while (left := sum(sizes[i] for i in state.remaining())) > rate * total and not state.done:
            self._run_round(text, state)
        kept = keep_best(state.scores(), sizes, max(rate, left / max(total, 1)))
        return words.join_words(text, state.pieces, kept)

    def _run_round(self, text: str, state: RemovalState) -> None:
        """Send the remaining words, chunk by chunk, and mark the ones that the model removes."""
        left = state.remaining()
        state.rounds += 1
        for chunk in words.split_chunks(text, [state.pieces[i] for i in left], [1] * len(left), CHUNK_WORDS):
            sent = {left[n] for n in chunk}
            part = words.join_words(text, state.pieces, [i in sent for i in range(len(state.pieces))])
            kept = self._kept_words(part, first=state.rounds == 1)
            for i, stays in zip(sorted(sent), kept, strict=True):
                state.removed_in[i] = 0 if stays else state.rounds
        still = len(state.remaining())
        state.done = state.rounds == ROUNDS or still > (1 - MIN_REMOVED) * len(left) or not still

    def _kept_words(self, text: str, first: bool) -> list[bool]:
        """Which words of one chunk the model keeps: all where its answer is no compression, a ModelError if `first`."""
        prompt = INSTRUCTION.replace("{text}", text)
        key = digest(["chat", self.config.base_url, self.config.model, prompt])
        answer = known = cache.load_result(key)
        if answer is None:
            try:
                answer = self.service.chat(self.config.model, prompt, len(text) // 2 + 64).text
            except TrainingError as error:
                raise ModelError(f"compress.name generation: {error}") from None
        original, output = ([_normalise(w) for w in t.split()] for t in (text, answer))
        kept = words.find_kept_words(original, output)
        refused = not output or sum(kept) < MIN_ORIGINAL * len(output)
        if refused and first:
            found = f"{self.config.model} did not compress the text but answered {answer[:80]!r}"
            raise ModelError(f"{found}; compress.model must follow instructions")
        if known is None:
            cache.store_result(key, answer)
        return [True] * len(original) if refused else kept


def _van_der_corput(n: int) -> float:
    """The n-th number of van der Corput's sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{n:b}"[::-1], 2) / 2 ** n.bit_length() if n else 0.0


def _normalise(word: str) -> str:
    """A word for comparison: models move commas and change capitals."""
    return word.strip(string.punctuation).casefold() or word
