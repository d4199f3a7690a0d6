"""Rows that share no batch: each has a cache of the model's own kind and is computed by itself, for models whose state is not keys and values alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from pi_ray.models import last
from pi_ray.serve.engine.multi_lora import AdapterStack


class Apart:
    """As slots.Slots, but for `copy` and `paste`: any decoder, no faster together than one after the other."""

    splits = False  # a recurrent layer reads more than one token only at the start

    def __init__(self, model: Any, stack: AdapterStack, name: str):
        self.model, self.stack = model, stack
        self.lengths: list[int] = []
        self._name = name
        self._caches: list[Any] = []

    @property
    def nbytes(self) -> int:
        return 0

    def add(self, rows: int) -> None:
        self.lengths += [0] * rows
        self._caches += [DynamicCache(config=self.model.config) for _ in range(rows)]

    def read(self, first: int, chunks: Sequence[Sequence[int]], adapters: Sequence[int]) -> torch.Tensor:
        """As Slots.read, without padding."""
        return torch.cat([self._one(first + i, chunk, adapter) for i, (chunk, adapter) in enumerate(zip(chunks, adapters, strict=True))])

    def _one(self, row: int, chunk: Sequence[int], adapter: int) -> torch.Tensor:
        start, device = self.lengths[row], self.model.device
        self.stack.use([adapter], len(chunk))
        out = self.model(
            input_ids=torch.tensor([list(chunk)], device=device), position_ids=torch.arange(start, start + len(chunk), device=device)[None],
            use_cache=True, logits_to_keep=last(1, device), **{self._name: self._caches[row]},
        )  # fmt: skip
        self.lengths[row] += len(chunk)
        return out.logits[:, -1]

    def move(self, source: int, target: int) -> None:
        self._caches[target], self.lengths[target] = self._caches[source], self.lengths[source]

    def pop(self) -> None:
        self.lengths.pop()
        self._caches.pop()
