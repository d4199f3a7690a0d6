"""Base of compressors that score the pieces of a text once and then keep the best of them at any rate; surprisal."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Self

import torch

from pi_ray import models
from pi_ray.compress import words
from pi_ray.config import CompressConfig, ModelConfig

CACHED_TEXTS = 64  # rankings kept; an actor may see any number of texts
# tokens of one forward pass; at least half of them stand before each scored token, where the text has them
WINDOW = 1024


@dataclass(frozen=True)
class Ranking:
    """Pieces of a text, separated by white space, with their scores and their sizes in the scorer's tokens."""

    pieces: Sequence[words.Span]
    scores: Sequence[float]
    sizes: Sequence[int]
    segments: Sequence[range] = ()  # of pieces that are compressed by themselves, best first

    @classmethod
    def from_tokens(cls, pieces: Sequence[words.Span], offsets: Sequence[words.Span], scores: torch.Tensor) -> Self:
        """Score each piece by the mean `scores` of its tokens, shape (tokens,); `offsets` are the tokens' spans."""
        tokens = words.tokens_by_span(pieces, offsets)
        return cls(pieces, [float(scores[t].mean()) if t else 0.0 for t in tokens], [len(t) for t in tokens])


class RankingCompressor:
    """Ranks each text once, since a text is compressed at many rates. Subclasses implement `rank`."""

    def __init__(self) -> None:
        self.ranking = lru_cache(CACHED_TEXTS)(self.rank)

    def rank(self, text: str) -> Ranking:
        """The pieces of a text by how much they tell."""
        raise NotImplementedError

    def compress(self, text: str, rate: float) -> str:
        ranking = self.ranking(text)
        return words.join_words(text, ranking.pieces, keep_best(ranking.scores, ranking.sizes, rate))


def keep_best(scores: Sequence[float], sizes: Sequence[int], rate: float) -> list[bool]:
    """Which pieces stay, by falling score, for sizes that come closest to `rate` of all; of equals the earlier."""
    kept, used, goal = [False] * len(scores), 0, rate * sum(sizes)
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if used + sizes[i] / 2 > goal:
            break
        kept[i] = True
        used += sizes[i]
    return kept


class SurprisalModel:
    """Surprisal of tokens, -log p in nats, under `config.model`, loaded on the CPU in float32 (or a ModelError)."""

    def __init__(self, config: CompressConfig):
        base = ModelConfig(base=config.model, dtype="float32")  # one template on every machine
        self.tokenizer, self.model = models.load_tokenizer(base), models.load_model(base)
        self.can_limit_logits = "logits_to_keep" in signature(self.model.forward).parameters
        self.window = min(WINDOW, getattr(self.model.config, "max_position_embeddings", WINDOW))
        # before the first token, so that it has a probability too
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        self.start_id = next(i for i in starts if i is not None)

    def surprisal(self, text: str, prefix: str = "") -> tuple[list[words.Span], torch.Tensor]:
        """Spans of the tokens of `text`, and -log p(token | `prefix`, earlier tokens), shape (tokens,).

        The last quarter window of a longer `prefix` is read.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        head = [self.start_id, *self.tokenizer(prefix, add_special_tokens=False).input_ids[-(self.window // 4) :]]
        ids, losses = encoded.input_ids, []
        step = (self.window - len(head)) // 2
        for begin in range(0, len(ids), step):
            context, scored = ids[max(0, begin - step) : begin], ids[begin : begin + step]
            losses.append(self._last_losses([*head, *context, *scored], len(scored)))
        return encoded["offset_mapping"], torch.cat(losses) if losses else torch.zeros(0)

    @torch.no_grad()
    def _last_losses(self, ids: list[int], count: int) -> torch.Tensor:
        """-log p of the last `count` of `ids`; other logits are not even computed where the model allows."""
        row = torch.tensor([ids])
        options = {"logits_to_keep": count + 1} if self.can_limit_logits else {}
        logits = self.model(input_ids=row, use_cache=False, **options).logits[0, -count - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.float(), row[0, -count:], reduction="none")
