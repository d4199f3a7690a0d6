"""How much each token of a text surprises a small causal language model: what Selective Context and LongLLMLingua score by."""

from __future__ import annotations

from inspect import signature

import torch

from pi_ray import models
from pi_ray.compress.words import Span
from pi_ray.config import CompressConfig, ModelConfig

WINDOW = 1024  # tokens the model sees at once; a token has at least half of them before it, where the text has


class SurprisalModel:
    """Loads `config.model` on the CPU in float32. Raises ModelError when it cannot be had."""

    def __init__(self, config: CompressConfig):
        base = ModelConfig(base=config.model)
        self.tokenizer, self.model = models.load_tokenizer(base), models.load_model(base)
        self.keeps = "logits_to_keep" in signature(self.model.forward).parameters
        self.window = min(WINDOW, getattr(self.model.config, "max_position_embeddings", WINDOW))

    def surprise(self, text: str, before: str = "") -> tuple[list[Span], torch.Tensor]:
        """Characters of each token of `text`, and -log p(token | `before`, the tokens before it) in nats.

        Of a long `before` the last quarter window is read.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        head = [*self._start(), *self._ids(before)[-(self.window // 4) :]]
        ids, parts = encoded.input_ids, []
        step = (self.window - len(head)) // 2
        for begin in range(0, len(ids), step):
            seen = ids[max(0, begin - step) : begin]
            new = ids[begin : begin + step]
            parts.append(self._losses([*head, *seen, *new], len(new)))
        return encoded["offset_mapping"], torch.cat(parts) if parts else torch.zeros(0)

    def _start(self) -> list[int]:
        """A token before the first, so that the first one has a probability too."""
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return [start if start is not None else 0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    @torch.no_grad()
    def _losses(self, ids: list[int], count: int) -> torch.Tensor:
        """Of the last `count` of `ids`; logits of others are not even computed where the model allows."""
        row = torch.tensor([ids])
        logits = self.model(input_ids=row, use_cache=False, **({"logits_to_keep": count + 1} if self.keeps else {})).logits[0, -count - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.float(), row[0, -count:], reduction="none")
