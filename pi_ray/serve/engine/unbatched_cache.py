"""UnbatchedCache: a cache of the model's own kind for each sequence, for models that keep other state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from pi_ray.models import last_logits_index
from pi_ray.serve.engine.multi_lora import MultiLora


class UnbatchedCache:
    """KVCache's interface without blocks, for any decoder; several sequences take as long as one after the other."""

    chunked_prefill = False  # a recurrent layer reads more than one token only at the start
    nbytes = 0

    def __init__(self, model: Any, multi_lora: MultiLora, cache_argument: str):
        self.model, self.multi_lora = model, multi_lora
        self.lengths: list[int] = []
        self._cache_argument = cache_argument
        self._caches: list[Any] = []

    def add_rows(self, rows: int) -> None:
        self.lengths += [0] * rows
        self._caches += [DynamicCache(config=self.model.config) for _ in range(rows)]

    def forward(self, first: int, chunks: Sequence[Sequence[int]], adapter_slots: Sequence[int]) -> torch.Tensor:
        """Append `chunks[i]` to row first + i -> the logits after it, (rows, vocabulary)."""
        rows = range(first, first + len(chunks))
        return torch.cat([self._forward_row(*row) for row in zip(rows, chunks, adapter_slots, strict=True)])

    def _forward_row(self, row: int, chunk: Sequence[int], adapter_slot: int) -> torch.Tensor:
        start, device = self.lengths[row], self.model.device
        self.multi_lora.set_active_slots([adapter_slot], len(chunk))
        out = self.model(
            input_ids=torch.tensor([list(chunk)], device=device),
            position_ids=torch.arange(start, start + len(chunk), device=device)[None],
            use_cache=True, logits_to_keep=last_logits_index(1, device), **{self._cache_argument: self._caches[row]},
        )  # fmt: skip
        self.lengths[row] += len(chunk)
        return out.logits[:, -1]

    def move_row(self, source: int, target: int) -> None:
        self._caches[target], self.lengths[target] = self._caches[source], self.lengths[source]

    def pop_row(self) -> None:
        self.lengths.pop()
        self._caches.pop()

    def copy_block(self, row: int, start: int, stop: int) -> Any:
        raise NotImplementedError("the prefix cache is off for this model")

    def load_blocks(self, row: int, blocks: Sequence[Any]) -> None:
        raise NotImplementedError("the prefix cache is off for this model")
