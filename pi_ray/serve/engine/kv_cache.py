"""Keys and values of the rows that decode together, each row at its own length, so that rows come and go at any step.

    keys, values   (layers, rows, heads, capacity, dim), every row from 0, zeros beyond it; transformers sees one layer at a time as its Cache

Needs attention over keys and values in every layer; a sliding window becomes part of the mask. `open_rows` finds out whether a model is such a one,
by computing with it, and else gives `apart.Apart`, where each row has a cache of the model's own kind.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from pi_ray.models import last
from pi_ray.serve.engine.multi_lora import BASE, AdapterStack
from pi_ray.serve.engine.unbatched_cache import Apart

log = logging.getLogger("ray.serve")
BLOCK = 64  # positions by which the capacity grows, at least
CLOSE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}  # of the logits' spread: rounding that two ways to compute them may differ by


class SlotLayer(DynamicLayer):
    """One layer of Slots in the shape that transformers expects."""

    def __init__(self, slots: Slots, index: int):
        super().__init__()
        self._slots, self._index = slots, index

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._slots.write(self._index, key_states, value_states)

    def get_seq_length(self, *_: Any) -> int:
        return 0


class Slots:
    """The rows in use are the first `len(lengths)`; `lengths[i]` tokens of row i have been read."""

    splits = True  # a prompt may be read in pieces

    def __init__(self, model: Any, stack: AdapterStack, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]):
        """`keys`, `values`: one tensor a layer, (1, heads, any, dim), such as the model has them."""
        self.model, self.stack = model, stack
        self.lengths: list[int] = []
        self.layers = len(keys)
        self.heads = keys[0].shape[1]
        self._like = {"dtype": keys[0].dtype, "device": keys[0].device}
        self._dims = keys[0].shape[3], values[0].shape[3]
        self._cache = Cache(layers=[SlotLayer(self, i) for i in range(self.layers)])
        self._masks = _Masks(model.config.get_text_config())
        self._name = cache_name(model)
        self._free()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def add(self, rows: int) -> None:
        """So many empty rows at the end."""
        self.lengths += [0] * rows
        self._reserve(len(self.lengths), 0)

    def read(self, first: int, chunks: Sequence[Sequence[int]], adapters: Sequence[int]) -> torch.Tensor:
        """Read `chunks[i]` at the end of row first + i with the adapter in slot `adapters[i]` -> the logits after it, (rows, vocabulary).

        Shorter chunks are padded on the left. What the padding computes lies behind the row's end, where it is masked until it is overwritten.
        """
        rows, wide = len(chunks), max(map(len, chunks))
        starts = self.lengths[first : first + rows]
        self._reserve(first + rows, max(starts) + wide)
        device = self._like["device"]
        ids = torch.tensor([[0] * (wide - len(c)) + list(c) for c in chunks]).to(device)
        start, size = torch.tensor([starts, [len(c) for c in chunks]])[..., None].to(device)
        steps = torch.arange(wide, device=device)
        real = steps >= wide - size
        positions = start + (steps + size) % wide  # the padding turns over to behind the end
        self._aim(first, positions, max(starts) + wide)
        self.stack.use(adapters, wide)
        out = self.model(
            input_ids=ids, attention_mask=self._masks(positions, self._window[1], self._like["dtype"]), position_ids=positions.where(real, 0),
            use_cache=True, logits_to_keep=last(1, device), **{self._name: self._cache},
        )  # fmt: skip
        for i, chunk in enumerate(chunks):
            self.lengths[first + i] += len(chunk)
        return out.logits[:, -1]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put (rows, heads, tokens, dim) where `_aim` said -> all that these rows may look at, (rows, heads, width, dim)."""
        rows, width = self._window
        found = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store.view(-1, store.shape[-1]).index_copy_(0, self._places, new.reshape(-1, store.shape[-1]))
            found.append(store[rows, :, :width])
        return found[0], found[1]

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        if source != target:
            self.keys[:, target], self.values[:, target] = self.keys[:, source], self.values[:, source]
            self.lengths[target] = self.lengths[source]

    def pop(self) -> None:
        """Drop the last row. It is zeroed: another row will lie there, and a masked NaN would still reach it."""
        self.lengths.pop()
        last = len(self.lengths)
        self.keys[:, last].zero_()
        self.values[:, last].zero_()
        if not self.lengths:
            self._free()

    def copy(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some positions of a row, (layers, heads, stop - start, dim) each."""
        return self.keys[:, row, :, start:stop].clone(), self.values[:, row, :, start:stop].clone()

    def paste(self, row: int, blocks: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Let an empty row begin with what `copy` gave, in order."""
        stop = sum(keys.shape[2] for keys, _ in blocks)
        self._reserve(len(self.lengths), stop)
        for store, parts in zip((self.keys, self.values), zip(*blocks, strict=True), strict=True):
            store[:, row, :, :stop] = torch.cat(parts, 2)
        self.lengths[row] = stop

    def _aim(self, first: int, positions: torch.Tensor, width: int) -> None:
        """Where the next pass writes, as indices into (rows * heads * capacity), and what it may look at."""
        rows, device = len(positions), positions.device
        line = (torch.arange(first, first + rows, device=device)[:, None] * self.heads + torch.arange(self.heads, device=device)) * self.keys.shape[3]
        self._places = (line[..., None] + positions[:, None]).flatten()
        self._window = slice(first, first + rows), width

    def _reserve(self, rows: int, capacity: int) -> None:
        have_rows, have = self.keys.shape[1], self.keys.shape[3]
        if rows <= have_rows and capacity <= have:
            return
        if rows > have_rows:
            rows = max(rows, 1 << (rows - 1).bit_length())
        if capacity > have:
            capacity = -(-max(capacity, have * 5 // 4) // BLOCK) * BLOCK
        rows, capacity = max(rows, have_rows), max(capacity, have, BLOCK)
        for name, dim in zip(("keys", "values"), self._dims, strict=True):
            old, new = getattr(self, name), torch.zeros(self.layers, rows, self.heads, capacity, dim, **self._like)
            new[:, :have_rows, :, :have] = old
            setattr(self, name, new)

    def _free(self) -> None:
        self.keys, self.values = (torch.zeros(self.layers, 0, self.heads, 0, dim, **self._like) for dim in self._dims)


class _Masks:
    """Additive masks as the model wants them: one, or one for each type of layer."""

    def __init__(self, config: Any):
        self._types = sorted(set(getattr(config, "layer_types", None) or []))
        self._slide = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None

    def __call__(self, positions: torch.Tensor, width: int, dtype: torch.dtype) -> Any:
        """`positions` (rows, tokens) -> (rows, 1, tokens, width): a token sees what stands before it in its row, and itself."""
        columns, positions = torch.arange(width, device=positions.device), positions[:, None, :, None]
        seen = columns <= positions
        near = seen & (columns > positions - self._slide) if self._slide else seen
        if len(self._types) > 1:
            return {kind: _additive(near if kind == "sliding_attention" else seen, dtype) for kind in self._types}
        return _additive(seen if self._types == ["full_attention"] else near, dtype)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def cache_name(model: Any) -> str:
    """transformers renamed the argument."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.inference_mode()
def open_rows(model: Any, stack: AdapterStack) -> Slots | Apart:
    """Slots where the model computes in them what it computes by itself, else Apart."""
    apart = Apart(model, stack, cache_name(model))
    try:
        reason = ""
        slots = _slots(model, stack)
        difference = _difference(apart, slots)
        if not difference < CLOSE.get(model.dtype, 0.1):
            reason = f"logits differ by {difference:.2g} of their spread"
    except Exception as error:
        reason = str(error)
    if not reason:
        return slots
    log.warning("this model cannot be batched token by token (%s): its answers are computed one after the other, without a prefix cache", reason)
    return apart


def _slots(model: Any, stack: AdapterStack) -> Slots:
    cache = DynamicCache(config=model.config)
    stack.use([BASE], 1)
    model(input_ids=torch.ones(1, 1, dtype=torch.long, device=model.device), use_cache=True, **{cache_name(model): cache})
    odd = {type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if odd:
        raise ValueError(f"it has layers that keep something else than keys and values: {', '.join(sorted(odd))}")
    keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
    if len({(k.shape, v.shape) for k, v in zip(keys, values, strict=True)}) != 1:
        raise ValueError("its layers have keys of several shapes")
    return Slots(model, stack, keys, values)


def _difference(apart: Apart, slots: Slots) -> float:
    """Largest difference of the logits after two prompts, one of them in two pieces with padding, over their standard deviation."""
    size = apart.model.config.get_text_config().vocab_size
    long, short = ([(start + 7 * i) % size for i in range(n)] for start, n in ((11, 7), (5, 3)))
    found = []
    for rows in (apart, slots):
        rows.add(2)
        if rows.splits:
            rows.read(0, [long[:2]], [BASE])
        found.append(rows.read(0, [long[rows.lengths[0] :], short], [BASE, BASE]).float())
        rows.pop()
        rows.pop()
    return ((found[0] - found[1]).abs().max() / found[0].std()).item()
