"""The cache of models that keep another state than a KVCache has: several sequences take as long as one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from pi_ray.serve.engine.kv_cache import last_logits
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.serve.engine.prefix_cache import Block, States


class UnbatchedCache:
    """KVCache's interface without blocks: a cache of the model's own kind for each sequence, for models that keep other
    state. Several sequences take as long as one after the other.
    """

    chunked_prefill = keeps_blocks = False  # a recurrent layer reads more than one token only at the start
    needs_states = False
    nbytes = planned = 0

    def __init__(self, model: Any, multi_lora: MultiLora):
        self.model, self.multi_lora = model, multi_lora
        self.lengths: list[int] = []
        self._caches: list[Cache] = []

    def bytes_for(self, *_: Any) -> int:
        """Not known here: such models keep little for a sequence."""
        return 0

    bytes_alone = compact = bytes_for

    def add_rows(self, rows: int) -> None:
        self.lengths += [0] * rows
        self._caches += [DynamicCache(config=self.model.config) for _ in range(rows)]

    def forward(self, first: int, chunks: Sequence[Sequence[int]], adapter_slots: Sequence[int]) -> torch.Tensor:
        """Append `chunks[i]` to row first + i -> the logits after it, (rows, vocabulary)."""
        logits = []
        for row, (chunk, slot) in enumerate(zip(chunks, adapter_slots, strict=True), start=first):
            self.multi_lora.set_active_slots([slot], len(chunk))
            ids = torch.tensor([list(chunk)], device=self.model.device)
            start, self.lengths[row] = self.lengths[row], self.lengths[row] + len(chunk)
            positions = torch.arange(start, self.lengths[row], device=self.model.device)[None]
            logits.append(last_logits(self.model, self._caches[row], input_ids=ids, position_ids=positions))
        return torch.cat(logits)

    def move_row(self, source: int, target: int) -> None:
        self._caches[target], self.lengths[target] = self._caches[source], self.lengths[source]

    def pop_row(self) -> None:
        self.lengths.pop()
        self._caches.pop()

    def copy_block(self, *_: Any) -> Block:
        raise NotImplementedError("the prefix cache is off for this model")

    load_blocks = copy_block

    def copy_states(self, *_: Any) -> States | None:
        raise NotImplementedError("the prefix cache is off for this model")
