"""The KV cache of the running batch: each row has one sequence at its own length, so these come and go at any step.

    stores   keys, then values, (layers, rows, heads, capacity, dim); each row from position 0 on, zeros behind its end

Layers of another shape have stores of their own. Every layer attends to keys and values; a sliding window becomes part
of the mask. cache_choice.py finds out by computing with a model which cache it takes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from pi_ray.config import ServeConfig
from pi_ray.models import cache_argument, last_logits_index
from pi_ray.models.device import free_bytes, free_host_bytes
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.serve.engine.prefix_cache import Block, States

CAPACITY_STEP = 64  # positions by which the capacity grows, at least
LEAST_PREFIX_CACHE = 512 << 20  # bytes: a prompt of 1,024 tokens of Llama-2-7B


def kv_cache_limit(serve: ServeConfig, device: torch.device) -> int:
    """Bytes for the cache of one replica; call it after the model is loaded. Growing takes old and new at once."""
    return serve.kv_cache_mb << 20 if serve.kv_cache_mb else _free_bytes(serve, device) // 2


def prefix_cache_limit(serve: ServeConfig, device: torch.device) -> int:
    """Bytes for prompts that begin alike, of one replica; call it after the model is loaded."""
    if serve.prefix_cache_mb != "auto":
        return serve.prefix_cache_mb << 20
    return max(LEAST_PREFIX_CACHE, _free_bytes(serve, device) // 8)


def _free_bytes(serve: ServeConfig, device: torch.device) -> int:
    """Ask how much memory the GPU has free, or the host for each replica."""
    if (free := free_bytes(device)) is not None:
        return free
    return free_host_bytes() // serve.max_replicas


class KVCache(Cache):
    """The rows in use are the first `len(lengths)`; `lengths[i]` tokens of row i have been read.

    The model sees it as a transformers Cache without layers, which has read nothing: mask and positions say the rest.
    """

    chunked_prefill = True  # a prompt may be read in pieces
    keeps_blocks = True  # blocks of a row can be copied, for the prefix cache
    needs_states = False  # a row that begins with blocks needs the states behind them too

    def __init__(self, model: Any, multi_lora: MultiLora, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]):
        """`keys`, `values`: one tensor a layer as the model makes them, (1, heads, any, dim)."""
        super().__init__(layers=[])
        shapes = [(k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(keys, values, strict=True)]
        groups = list(dict.fromkeys(shapes))
        # layer -> (its first store, its place there)
        self._store_of = [(2 * groups.index(shape), shapes[:i].count(shape)) for i, shape in enumerate(shapes)]
        # (layers, heads, dim) of each store
        self._dims = [(shapes.count(shape), shape[0], dim) for shape in groups for dim in shape[1:]]
        self.model, self.multi_lora = model, multi_lora
        self.lengths: list[int] = []
        self.planned = 0  # positions that the longest sequence under way may reach; the capacity grows no further
        self._like: dict[str, Any] = {"dtype": keys[0].dtype, "device": keys[0].device}
        self._config = model.config.get_text_config()
        self._release()

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    @property
    def reserved(self) -> tuple[int, int]:
        """(rows, positions of each)."""
        return self.stores[0].shape[1], self.stores[0].shape[3]

    def bytes_for(self, rows: int, positions: int, compacted: bool = False) -> int:
        """The size for `rows` rows whose longest, or a planned one, has `positions`; `compacted`: after `compact`."""
        old = self._compact_shape() if compacted else self.reserved
        return self._bytes(*self._shape(rows, max(positions, self.planned), old))

    def bytes_alone(self, positions: int) -> int:
        """The cache's size for a single sequence of `positions`."""
        return self._bytes(*self._shape(1, positions, (0, 0)))

    def compact(self) -> None:
        """Free what neither the rows in use nor the planned positions need."""
        self._resize(*self._compact_shape())

    def add_rows(self, rows: int) -> None:
        """Append so many empty rows."""
        self._reserve(len(self.lengths) + rows, 0)
        self.lengths += [0] * rows

    def forward(self, first: int, chunks: Sequence[Sequence[int]], adapter_slots: Sequence[int]) -> torch.Tensor:
        """Append ids `chunks[i]` to row first + i, under `adapter_slots[i]` -> the logits after it, (rows, vocabulary).

        Shorter chunks are padded on the left. The padding's keys and values lie masked behind the row's end.
        """
        rows, width = len(chunks), max(map(len, chunks))
        starts = self.lengths[first : first + rows]
        self._reserve(first + rows, max(starts) + width)
        device = self._like["device"]
        ids = torch.tensor([[0] * (width - len(c)) + list(c) for c in chunks]).to(device)
        start, size = torch.tensor([starts, [len(c) for c in chunks]])[..., None].to(device)
        steps = torch.arange(width, device=device)
        real = steps >= width - size
        positions = start + (steps + size) % width  # the padding wraps around to behind the row's end
        self._set_write_positions(first, positions, max(starts) + width)
        self.multi_lora.set_active_slots(adapter_slots, width)
        mask = self._masks(positions, max(starts) + width)
        positions = positions.where(real, 0)
        logits = last_logits(self.model, self, input_ids=ids, attention_mask=mask, position_ids=positions)
        for i, chunk in enumerate(chunks):
            self.lengths[first + i] += len(chunk)
        return logits

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (rows, heads, tokens, dim) at the write positions -> all that the rows attend to, (..., width, dim)."""
        (first, place), (rows, width) = self._store_of[layer_idx], self._visible
        index, visible = self._write_index[key_states.shape[1]], []
        for store, new in ((self.stores[first], key_states), (self.stores[first + 1], value_states)):
            store[place].view(-1, store.shape[-1]).index_copy_(0, index, new.reshape(-1, store.shape[-1]))
            visible.append(store[place, rows, :, :width])
        return visible[0], visible[1]

    def move_row(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        for store in self.stores:
            store[:, target] = store[:, source]
        self.lengths[target] = self.lengths[source]

    def pop_row(self) -> None:
        """Drop the last row and zero it: a NaN left there would reach the next sequence even through the mask."""
        self.lengths.pop()
        last = len(self.lengths)
        for store in self.stores:
            store[:, last].zero_()
        if not self.lengths:
            self._release()

    def copy_block(self, row: int, start: int, stop: int) -> Block:
        """Keys and values of some positions of a row, (layers, heads, stop - start, dim) from each store."""
        return tuple(store[:, row, :, start:stop].clone() for store in self.stores)

    def copy_states(self, row: int) -> States | None:
        """The states of a row's layers at its end; None where all keep keys and values."""
        return None

    def load_blocks(self, row: int, blocks: Sequence[Block], states: States | None = None) -> None:
        """Let an empty row begin with blocks from `copy_block`, in order, and `states` from `copy_states` behind them.
        """
        stop = sum(block[0].shape[2] for block in blocks)
        self._reserve(len(self.lengths), stop)
        for store, parts in zip(self.stores, zip(*blocks, strict=True), strict=True):
            store[:, row, :, :stop] = torch.cat(parts, 2)
        self.lengths[row] = stop

    def _masks(self, positions: torch.Tensor, width: int) -> Any:
        """`positions` (rows, tokens) -> the model's attention mask: one, or one for each of its types of layers.

        Raises ValueError for a type that is not known here.
        """
        masks = additive_masks(self._config, positions, width, self._like["dtype"])
        types = set(getattr(self._config, "layer_types", None) or ["sliding_attention"])  # full without a window
        if unknown := types - masks.keys():
            raise ValueError(f"it has layers of type {', '.join(sorted(unknown))}")
        return {kind: masks[kind] for kind in types} if len(types) > 1 else masks[types.pop()]

    def _set_write_positions(self, first: int, positions: torch.Tensor, width: int) -> None:
        """Set where the next pass writes, as indices into (rows * heads * capacity) for each number of heads, and what
        it sees.
        """
        rows, device = len(positions), positions.device
        row_index = torch.arange(first, first + rows, device=device)[:, None]
        self._write_index: dict[int, torch.Tensor] = {}
        for heads in {heads for _, heads, _ in self._dims}:
            offsets = (row_index * heads + torch.arange(heads, device=device)) * self.reserved[1]
            self._write_index[heads] = (offsets[..., None] + positions[:, None]).flatten()
        self._visible = slice(first, first + rows), width

    def _shape(self, rows: int, capacity: int, old: tuple[int, int]) -> tuple[int, int]:
        """(rows, capacity) to reserve for these where `old` are: rows double, the capacity grows by steps."""
        old_rows, old_capacity = old
        if rows > old_rows:
            rows = 1 << (rows - 1).bit_length()
        if capacity > old_capacity:
            ahead = min(old_capacity * 5 // 4, self.planned)
            capacity = -(-max(capacity, ahead) // CAPACITY_STEP) * CAPACITY_STEP
        return max(rows, old_rows), max(capacity, old_capacity, CAPACITY_STEP)

    def _compact_shape(self) -> tuple[int, int]:
        """(rows, capacity) that the rows in use, doubled from one, and the planned positions need."""
        used = 1 << (len(self.lengths) - 1).bit_length() if self.lengths else 0
        planned = -(-self.planned // CAPACITY_STEP) * CAPACITY_STEP
        return min(used, self.reserved[0]), min(planned, self.reserved[1])

    def _bytes(self, rows: int, positions: int) -> int:
        return sum(map(math.prod, self._dims)) * rows * positions * self._like["dtype"].itemsize

    def _reserve(self, rows: int, capacity: int) -> None:
        old = self.reserved
        if rows > old[0] or capacity > old[1]:
            self._resize(*self._shape(rows, capacity, old))

    def _resize(self, rows: int, capacity: int) -> None:
        r, c = min(rows, self.reserved[0]), min(capacity, self.reserved[1])
        for i, (layers, heads, dim) in enumerate(self._dims):
            new = torch.zeros(layers, rows, heads, capacity, dim, **self._like)
            new[:, :r, :, :c] = self.stores[i][:, :r, :, :c]
            self.stores[i] = new

    def _release(self) -> None:
        self.planned = 0
        self.stores = [torch.zeros(layers, 0, heads, 0, dim, **self._like) for layers, heads, dim in self._dims]


def last_logits(model: Any, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits after the last token of each row, (rows, vocabulary)."""
    index = last_logits_index(1, inputs["input_ids"].device)
    out = model(**inputs, use_cache=True, logits_to_keep=index, **{cache_argument(model.__class__): cache})
    return out.logits[:, -1]


def additive_masks(config: Any, positions: torch.Tensor, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`positions` (rows, tokens) -> an additive mask (rows, 1, tokens, width) for each known type of attention."""
    window, chunk = reaches(config)
    columns, positions = torch.arange(width, device=positions.device), positions[:, None, :, None]
    causal = columns <= positions  # a token sees itself and those before it
    near = causal & (columns > positions - window) if window else causal
    same = causal & (columns // chunk == positions // chunk) if chunk else causal
    full = _additive(causal, dtype)
    return {
        "full_attention": full, "sliding_attention": _additive(near, dtype) if window else full,
        "chunked_attention": _additive(same, dtype) if chunk else full,
    }


def reaches(config: Any) -> tuple[int, int]:
    """Tokens of a sliding window and of a chunk of attention; 0 where the model has none."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window or 0, getattr(config, "attention_chunk_size", None) or 0


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
