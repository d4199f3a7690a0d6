"""Several LoRA adapters in one batch: every adapted linear layer holds them stacked, and each row has its own.

A decoding step takes two batched matrix products a layer, however many adapters take part: the rows of each adapter,
padded to the largest group, times the stacked A, times the stacked B (Punica, Chen 2023; S-LoRA, Sheng 2023).
"""

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers, whose weight is (in, out)

from pi_ray.errors import AdapterError
from pi_ray.serve.engine.onednn_linear import get_weight, set_weight
from pi_ray.store.adapters import check_unchanged
from pi_ray.store.verify import CONFIG_FILE, LORA_TENSOR, MAX_RANK, WEIGHTS_FILE, open_weights, read_json

BASE_SLOT = -1  # the slot of rows without an adapter
MAX_PADDING = 4  # padded places for each row, up to which one batched product is faster than adapters in turn
EXPERT_LAYER = ".experts."  # single experts see tokens of many rows, in an order of their own
AddLora = Callable[["MultiLoraLayer", torch.Tensor, torch.Tensor], Any]  # (layer, input, output): adds to the output
# Module name -> A (rank, in) and B (out, rank) of one adapter, with the scaling in B, float32 on the CPU.
LoraPairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LoadedAdapter(NamedTuple):
    slot: int
    rank: int
    layers: Collection[str]  # that it adapts


class NoRoomError(Exception):
    """There is no memory for an adapter beside those in use; `has_room_for` tells when there is."""


class MultiLoraLayer:
    """Stacked weights of one linear layer: `a` (slots, rank, in), `b` (slots, rank, out), padded with zeros."""

    def __init__(self, linear: Any, slots: int, rank: int, like: dict[str, Any], multi_lora: "MultiLora"):
        in_features, out_features = _features(linear)
        self.a = torch.zeros(slots, rank, in_features, **like)
        self.b = torch.zeros(slots, rank, out_features, **like)
        self._multi_lora = multi_lora
        self.remove = linear.register_forward_hook(self._hook).remove

    def _hook(self, module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if add_lora := self._multi_lora.add_lora:
            add_lora(self, inputs[0].reshape(-1, self.a.shape[2]), output.view(-1, self.b.shape[2]))

    def set_slot(self, slot: int, pair: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.a[slot].zero_()
        self.b[slot].zero_()
        if pair:
            a, b = pair
            self.a[slot, : len(a)].copy_(a)
            self.b[slot, : len(a)].copy_(b.T)

    def resize(self, slots: int, rank: int) -> None:
        if self.a.shape[:2] == (slots, rank):
            return
        s, r = min(slots, self.a.shape[0]), min(rank, self.a.shape[1])
        a, b = (old.new_zeros(slots, rank, old.shape[2]) for old in (self.a, self.b))
        a[:s, :r], b[:s, :r] = self.a[:s, :r], self.b[:s, :r]
        self.a, self.b = a, b  # both or, without memory for one of them, neither


class MultiLora:
    """Holds at most `max_loras` adapters in at most `max_bytes`, and evicts the least recently used.

    Memory grows with what is loaded: each layer's stack has the highest rank of the adapters that adapt this layer.
    One thread calls it. `set_active_slots` says which adapter each row of the next forward pass of `base` has.
    """

    def __init__(self, base: Any, max_loras: int, max_rank: int = MAX_RANK, max_bytes: int = sys.maxsize):
        self.max_loras, self.max_rank, self.max_bytes = max_loras, max_rank, max_bytes
        self.add_lora: AddLora | None = None  # how the next forward pass adds adapters; None: no row has one
        self.merged = ""
        self.hits = self.misses = self.evictions = 0
        self._linears = {name: m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
        self._like = {"dtype": base.dtype, "device": base.device}
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # by key, least recently used first
        self._layers: dict[str, MultiLoraLayer] = {}
        self._postponed: dict[str, tuple[int, Collection[str]]] = {}  # key -> rank and layers, after a NoRoomError
        self._active: Any = None

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in list(self._layers.values()) for t in (layer.a, layer.b))

    def has_room_for(self, key: str, in_use: Collection[str]) -> bool:
        """Whether adapter `key` can be loaded without evicting one of `in_use`, as far as its size is known."""
        if not key or self.merged or key in self._loaded:
            return True
        if len(set(in_use) - {""}) >= self.max_loras:
            return False
        kept = [self._loaded[other] for other in in_use if other in self._loaded]
        return key not in self._postponed or self._fits(kept, *self._postponed[key])

    @torch.inference_mode()
    def load(self, folder: str, in_use: Collection[str] = (), manifest_hash: str = "") -> int:
        """Load `folder` if need be -> its slot; "" is the bare base.

        Raises AdapterError where it fits neither the base nor the limits, NoRoomError where it must wait for others.
        The adapter's key is `manifest_hash`, without one the folder: a folder that was replaced is another adapter.
        """
        if self.merged and folder != self.merged:
            merged = "one adapter merged into the base model (serve.merge) and serves it alone"
            raise AdapterError(f"this server has {merged}; {'no other one' if folder else 'not the bare base'}")
        if self.merged or not folder:
            return BASE_SLOT
        key = manifest_hash or folder
        if key in self._loaded:
            self.hits += 1
        else:
            self.misses += 1
            pairs = self._read(folder, partial(self._check_limits, key, in_use))
            if manifest_hash:
                check_unchanged(folder, manifest_hash)
            self._place(key, pairs, in_use)
        self._loaded.move_to_end(key)
        return self._loaded[key].slot

    def set_active_slots(self, slots: Sequence[int], tokens: int) -> None:
        """Row i of the next forward pass, of `tokens` tokens, has the adapter in `slots[i]` (or BASE_SLOT)."""
        active = (tuple(slots), tokens)
        if active != self._active:
            self.add_lora, self._active = self._choose(slots, tokens), active

    @torch.no_grad()
    def merge(self, folder: str) -> None:
        """Add `folder` into the base weights for good; it alone is served then. May raise AdapterError."""
        pairs = self._read(folder)
        if not all(self._linears[name].weight.is_floating_point() for name in pairs):
            cure = "leave serve.merge or model.quantize out"
            raise AdapterError(f"an adapter cannot be merged into quantised weights; {cure}")
        for name, (a, b) in pairs.items():
            linear = self._linears[name]
            weight = get_weight(linear)
            added = b.to(weight.device) @ a.to(weight.device)
            added = added.T if isinstance(linear, Conv1D) else added
            set_weight(linear, (weight.float() + added).to(weight.dtype))
        self.merged = folder

    def _read(self, folder: str, check_limits: Callable[[int, Collection[str]], None] | None = None) -> LoraPairs:
        """Read a verified adapter by name and shape: of its config only rank and scaling have an effect.

        Raises AdapterError, before a tensor is read, when one does not fit its layer, and for an overflow. Before that
        `check_limits` is called with rank and layers.
        """
        saved = read_json(Path(folder, CONFIG_FILE))
        scale = saved["lora_alpha"] / (math.sqrt(saved["r"]) if saved.get("use_rslora") else saved["r"])
        names: dict[str, dict[str, str]] = {}
        with open_weights(Path(folder, WEIGHTS_FILE)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                match = LORA_TENSOR.fullmatch(name)
                assert match, "verification lets no other names through"
                _check_fit(match[1], match[2], file.get_slice(name).get_shape(), self._linears)
                names.setdefault(match[1], {})[match[2]] = name
            if check_limits:
                check_limits(saved["r"], names.keys())
            pairs = {
                module: (file.get_tensor(pair["A"]).float(), file.get_tensor(pair["B"]).float() * scale)
                for module, pair in names.items()
            }
        dtype = self._like["dtype"]
        for module, pair in pairs.items():
            if not all(torch.isfinite(t.to(dtype)).all() for t in pair):
                raise AdapterError(f"its matrices for {module!r} with their scaling are too large for {dtype}")
        return pairs

    def _check_limits(self, key: str, in_use: Collection[str], rank: int, layers: Collection[str]) -> None:
        """Raise AdapterError for an adapter too large by itself, NoRoomError for one too large beside those in use."""
        if rank > self.max_rank:
            raise AdapterError(f"it has rank {rank}; this server takes up to {self.max_rank} (serve.max_lora_rank)")
        if not self._fits([], rank, layers):
            size, limit = (f"{n / 2**20:,.1f} MiB" for n in (self._bytes_beside([], rank, layers), self.max_bytes))
            raise AdapterError(f"it takes {size} of memory; this server has {limit} for adapters (serve.max_lora_mb)")
        kept = [adapter for other, adapter in self._loaded.items() if other in in_use]
        if len(kept) >= self.max_loras or not self._fits(kept, rank, layers):
            self._postponed[key] = rank, layers
            raise NoRoomError
        self._postponed.pop(key, None)

    def _fits(self, others: Collection[LoadedAdapter], rank: int, layers: Collection[str]) -> bool:
        return self._bytes_beside(others, rank, layers) <= self.max_bytes

    def _bytes_beside(self, others: Collection[LoadedAdapter], rank: int, layers: Collection[str]) -> int:
        """Bytes of all stacks when an adapter joins `others`."""
        slots, ranks = self._layout([*others, LoadedAdapter(self._free_slot(others), rank, layers)])
        sizes = ((sum(_features(self._linears[name])), rank) for name, rank in ranks.items())
        return slots * self._like["dtype"].itemsize * sum(size * rank for size, rank in sizes)

    def _free_slot(self, others: Collection[LoadedAdapter]) -> int:
        return min(set(range(self.max_loras)) - {adapter.slot for adapter in others})

    def _layout(self, adapters: Collection[LoadedAdapter]) -> tuple[int, dict[str, int]]:
        """(slots, layer -> rank) of the stacks for these adapters. Slots are doubled, so that they seldom change."""
        ranks: dict[str, int] = {}
        for adapter in adapters:
            ranks |= {name: max(adapter.rank, ranks.get(name, 0)) for name in adapter.layers}
        return min(1 << max(adapter.slot for adapter in adapters).bit_length(), self.max_loras), ranks

    def _place(self, key: str, pairs: LoraPairs, in_use: Collection[str]) -> None:
        """Load an adapter within the limits, which evicts as many idle ones as it must."""
        rank, idle = max(len(a) for a, _ in pairs.values()), [k for k in self._loaded if k not in in_use]
        while len(self._loaded) >= self.max_loras or not self._fits(self._loaded.values(), rank, pairs.keys()):
            self._evict(idle.pop(0))
            self.evictions += 1
        slot = self._free_slot(self._loaded.values())
        self._loaded[key] = LoadedAdapter(slot, rank, pairs.keys())
        try:
            slots, ranks = self._layout(self._loaded.values())
            for name, layer in self._layers.items():
                layer.resize(slots, ranks[name])
            for name in pairs.keys() - self._layers.keys():
                self._layers[name] = MultiLoraLayer(self._linears[name], slots, ranks[name], self._like, self)
            for name, layer in self._layers.items():
                layer.set_slot(slot, pairs.get(name))
        except BaseException:  # such as no memory: the next request must not meet a part of the adapter
            self._evict(key)
            raise

    def _evict(self, key: str) -> None:
        self._loaded.pop(key)
        for name in self._layers.keys() - {name for adapter in self._loaded.values() for name in adapter.layers}:
            self._layers.pop(name).remove()

    def _choose(self, slots: Sequence[int], tokens: int) -> AddLora | None:
        """The fastest way to add the adapters of these rows; None where no row has one."""
        used = set(slots) - {BASE_SLOT}
        if not used:
            return None
        if len(set(slots)) == 1:
            slot = slots[0]
            return lambda layer, x, out: out.addmm_(F.linear(x, layer.a[slot]), layer.b[slot])
        if tokens > 1:
            return _in_turn(slots)
        low, high = min(used), max(used) + 1
        groups = [[row for row, own in enumerate(slots) if own == slot] for slot in range(low, high)]
        if len(groups) * max(map(len, groups)) <= MAX_PADDING * len(slots):
            return _batched(groups, low, self._like["device"])
        return _in_turn(slots)


def _features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def _check_fit(module: str, side: str, shape: Sequence[int], layers: dict[str, Any]) -> None:
    """Raise AdapterError where a matrix, `side` A or B, is for a layer that does not exist or has another size."""
    if module not in layers:
        raise AdapterError(f"it adapts {module!r}, which the base model does not have as a linear layer")
    if EXPERT_LAYER in module:
        limit = "adapters of single experts can be evaluated but not served"
        raise AdapterError(f"it adapts {module!r}, one expert of several; {limit}")
    in_features, out_features = _features(layers[module])
    expected, found = (in_features, shape[1]) if side == "A" else (out_features, shape[0])
    if expected != found:
        raise AdapterError(f"its matrix {side} for {module!r} has size {found}, the base model's layer has {expected}")


def _in_turn(slots: Sequence[int]) -> AddLora:
    """One run of rows with the same adapter after the other; for prompts: sorted rows of many tokens."""
    runs, end = [], 0  # (slot, first row, end)
    for slot, rows in groupby(slots):
        start, end = end, end + len(list(rows))
        if slot != BASE_SLOT:
            runs.append((slot, start, end))

    def add_lora(layer: MultiLoraLayer, x: torch.Tensor, out: torch.Tensor) -> None:
        tokens = len(x) // len(slots)  # of a row; the output layer sees one
        for slot, start, end in runs:
            part = slice(start * tokens, end * tokens)
            out[part].addmm_(F.linear(x[part], layer.a[slot]), layer.b[slot])

    return add_lora


def _batched(groups: Sequence[Sequence[int]], low: int, device: Any) -> AddLora:
    """One batched product; `groups[i]` are the rows of slot low + i, of one token each, padded with row 0."""
    size, high = max(map(len, groups)), low + len(groups)
    padded = torch.tensor([[*group, *[0] * (size - len(group))] for group in groups]).flatten().to(device)
    pairs = sorted((row, i * size + j) for i, group in enumerate(groups) for j, row in enumerate(group))
    rows, places = torch.tensor(pairs).T.contiguous().to(device)
    contiguous = len(rows) == rows[-1] - rows[0] + 1
    block = slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else None  # neighbours are added at once

    def add_lora(layer: MultiLoraLayer, x: torch.Tensor, out: torch.Tensor) -> None:
        inner = torch.bmm(x.index_select(0, padded).view(len(groups), size, -1), layer.a[low:high].transpose(1, 2))
        products = torch.bmm(inner, layer.b[low:high]).flatten(0, 1).index_select(0, places)
        if block:
            out[block].add_(products)
        else:
            out.index_add_(0, rows, products)

    return add_lora
