"""Surprisal of tokens, -log p in nats, under a small causal language model: what phrases and segments score by."""

from __future__ import annotations

from inspect import signature

import torch

from pi_ray import models
from pi_ray.compress.words import Span
from pi_ray.config import CompressConfig, ModelConfig

# tokens of one forward pass; at least half of them stand before each scored token, where the text has them
WINDOW = 1024


class SurprisalModel:
    """Loads `config.model` on the CPU in float32. Raises ModelError where it cannot be loaded."""

    def __init__(self, config: CompressConfig):
        base = ModelConfig(base=config.model)
        self.tokenizer, self.model = models.load_tokenizer(base), models.load_model(base)
        self.can_limit_logits = "logits_to_keep" in signature(self.model.forward).parameters
        self.window = min(WINDOW, getattr(self.model.config, "max_position_embeddings", WINDOW))

    def surprisal(self, text: str, prefix: str = "") -> tuple[list[Span], torch.Tensor]:
        """Spans of the tokens of `text`, and -log p(token | `prefix`, earlier tokens), shape (tokens,).

        The last quarter window of a longer `prefix` is read.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        head = [self._start_id(), *self.tokenizer(prefix, add_special_tokens=False).input_ids[-(self.window // 4) :]]
        ids, losses = encoded.input_ids, []
        step = (self.window - len(head)) // 2
        for begin in range(0, len(ids), step):
            context, scored = ids[max(0, begin - step) : begin], ids[begin : begin + step]
            losses.append(self._last_losses([*head, *context, *scored], len(scored)))
        return encoded["offset_mapping"], torch.cat(losses) if losses else torch.zeros(0)

    def _start_id(self) -> int:
        """The id that stands before the first token, so that the first one has a probability too."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((i for i in ids if i is not None), 0)

    @torch.no_grad()
    def _last_losses(self, ids: list[int], count: int) -> torch.Tensor:
        """-log p of the last `count` of `ids`; other logits are not even computed where the model allows."""
        row = torch.tensor([ids])
        options = {"logits_to_keep": count + 1} if self.can_limit_logits else {}
        logits = self.model(input_ids=row, use_cache=False, **options).logits[0, -count - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.float(), row[0, -count:], reduction="none")
