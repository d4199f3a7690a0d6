"""The KV cache of a model in which some layers keep a state in place of, or beside, keys and values.

Such layers are gated delta nets, Mamba's and short convolutions. A step of decoding takes all rows at once: a layer
finds the states of these rows side by side, and leaves the new ones there. A prompt is read by itself, whole or in
pieces, since padding would change a state. A row that begins with cached blocks takes the states behind them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pi_ray.serve.engine.kv_cache import KVCache, additive_masks
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.serve.engine.prefix_cache import Block, States

CONV, RECURRENT = "conv", "recurrent"
Key = tuple[int, str, int]  # layer, CONV or RECURRENT, number of the state in its layer


class HybridKVCache(KVCache):
    """A KVCache that has the states of the rows too. `states`: one row of each, as the model makes them."""

    needs_states = True

    def __init__(
        self, model: Any, multi_lora: MultiLora, keys: dict[int, torch.Tensor], values: dict[int, torch.Tensor],
        states: dict[Key, torch.Tensor],
    ):
        """`keys`, `values`: those of the layers that have some, by layer."""
        self._places = {layer: place for place, layer in enumerate(keys)}
        self._like_states = {key: (state.shape[1:], state.dtype) for key, state in states.items()}
        self._states: dict[Key, torch.Tensor] = {}  # (rows, ...)
        super().__init__(model, multi_lora, list(keys.values()), list(values.values()))

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(state.nbytes for state in self._states.values())

    def forward(self, first: int, chunks: Sequence[Sequence[int]], adapter_slots: Sequence[int]) -> torch.Tensor:
        """As KVCache.forward: all rows at once where each has a state and one new token, else one after the other."""
        rows = list(zip(range(first, first + len(chunks)), chunks, adapter_slots, strict=True))
        if len(rows) == 1 or all(self.lengths[row] and len(chunk) == 1 for row, chunk, _ in rows):
            return super().forward(first, chunks, adapter_slots)
        return torch.cat([super(HybridKVCache, self).forward(row, [chunk], [slot]) for row, chunk, slot in rows])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(key_states, value_states, self._places[layer_idx])

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._seen_state((layer_idx, CONV, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._seen_state((layer_idx, RECURRENT, state_idx))

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Keep the last inputs of a convolution; returns the new ones (rows, D, tokens) behind those that were kept."""
        key = (layer_idx, CONV, state_idx)
        before = self._seen_state(key)
        store = self._states[key][self._visible[0]]
        size = store.shape[-1]
        if before is None:
            whole = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            whole = torch.cat([before, conv_states], -1)
        store.copy_(whole[..., -size:])
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        store = self._states[layer_idx, RECURRENT, state_idx][self._visible[0]]
        return store.copy_(recurrent_states)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.lengths[self._visible[0].start])

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_recurrent_states_to_keep(self, layer_idx: int | None = None) -> int:
        return 0

    def increase_count(self, layer_idx: int, state_idx: int) -> None:
        """Called for a token whose convolution changed its state in place; `lengths` count the tokens here."""

    def move_row(self, source: int, target: int) -> None:
        super().move_row(source, target)
        for state in self._states.values():
            state[target] = state[source]

    def pop_row(self) -> None:
        super().pop_row()
        last = len(self.lengths)
        for state in self._states.values():
            state[last : last + 1].zero_()

    def copy_states(self, row: int) -> States:
        return {key: state[row].clone() for key, state in self._states.items()}

    def load_blocks(self, row: int, blocks: Sequence[Block], states: States | None = None) -> None:
        """Raises ValueError without `states`."""
        if states is None:
            raise ValueError("blocks without the states behind them")
        super().load_blocks(row, blocks)
        for key, state in states.items():
            self._states[key][row] = state

    def _seen_state(self, key: Key) -> torch.Tensor | None:
        """The states of the rows that are computed now, None at their beginning."""
        return self._states[key][self._visible[0]] if self.has_previous_state() else None

    def _masks(self, positions: torch.Tensor, width: int) -> Any:
        """A mask for each type of layer; those that keep a state have none."""
        masks = additive_masks(self._config, positions, width, self._like["dtype"])
        fields = ("layer_types", "layers_block_type")
        kinds = {name for field in fields for name in getattr(self._config, field, None) or ()}
        return {**dict.fromkeys({*kinds, "linear_attention"}), **masks, "attention": masks["full_attention"]}

    def _bytes(self, rows: int, positions: int) -> int:
        of_a_row = sum(shape.numel() * dtype.itemsize for shape, dtype in self._like_states.values())
        return super()._bytes(rows, positions) + rows * of_a_row

    def _resize(self, rows: int, capacity: int) -> None:
        super()._resize(rows, capacity)
        for key, (shape, dtype) in self._like_states.items():
            old, new = self._states[key], torch.zeros(rows, *shape, dtype=dtype, device=self._like["device"])
            kept = min(rows, len(old))
            new[:kept] = old[:kept]
            self._states[key] = new

    def _release(self) -> None:
        super()._release()
        empty = {key: torch.zeros(0, *shape, dtype=dtype) for key, (shape, dtype) in self._like_states.items()}
        self._states = {key: state.to(self._like["device"]) for key, state in empty.items()}
