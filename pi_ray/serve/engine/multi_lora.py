"""Several LoRA adapters in one batch: every adapted linear layer holds them stacked, and each row has its own."""

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers, whose weight is (in, out)

from pi_ray.errors import AdapterError
from pi_ray.models.fused_experts import FusedExperts, find_fused_experts
from pi_ray.serve.engine.multi_lora_layer import (
    BASE_SLOT,
    AddLora,
    MultiLoraLayer,
    choose_add_lora,
    linear_features,
)
from pi_ray.serve.engine.onednn_linear import get_weight, set_weight
from pi_ray.store.adapters import check_unchanged, replacement_refused
from pi_ray.store.verify import CONFIG_FILE, LORA_TENSOR, MAX_RANK, WEIGHTS_FILE, open_weights, read_json

EXPERT_LAYER = ".experts."
EXPERTS_ALONE = (  # experts see tokens of many rows, in an order of their own
    "an adapter of experts is not served beside others; merge it (serve.merge), or 'pi-ray export NAME --to merged'"
)
# Module name -> A (rank, in) and B (out, rank) of one adapter, with the scaling in B, float32 on the CPU. Those of
# fused experts have the rank once for each of them.
LoraPairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LoadedAdapter(NamedTuple):
    slot: int
    rank: int
    layers: Collection[str]  # that it adapts


class NoRoomError(Exception):
    """There is no memory for an adapter beside those in use; `has_room_for` tells when there is."""


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
        self._base = base
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

        Raises AdapterError where it fits neither the base nor the limits, StoreUnavailableError for a folder that goes
        away meanwhile, NoRoomError where it must wait for others.
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
            with replacement_refused(folder):
                pairs = self._read(folder, manifest_hash, partial(self._check_limits, key, in_use))
            self._place(key, pairs, in_use)
        self._loaded.move_to_end(key)
        return self._loaded[key].slot

    def set_active_slots(self, slots: Sequence[int], tokens: int) -> None:
        """Row i of the next forward pass, of `tokens` tokens, has the adapter in `slots[i]` (or BASE_SLOT)."""
        active = (tuple(slots), tokens)
        if active != self._active:
            self.add_lora, self._active = choose_add_lora(slots, tokens, self._like["device"]), active

    @torch.no_grad()
    def merge(self, folder: str) -> None:
        """Add `folder` into the base weights for good; it alone is served then. May raise AdapterError."""
        pairs, experts = self._read(folder), self._experts_of(folder)
        weights = {n: self._base.get_parameter(experts[n].parameter) for n in pairs if n in experts}
        linears = {n: self._linears[n] for n in pairs if n not in experts}
        if not all(w.is_floating_point() for w in (*weights.values(), *(m.weight for m in linears.values()))):
            cure = "leave serve.merge or model.quantize out"
            raise AdapterError(f"an adapter cannot be merged into quantised weights; {cure}")
        for name, linear in linears.items():
            weight = get_weight(linear)
            a, b = (matrix.to(weight.device) for matrix in pairs[name])
            added = (b @ a).T if isinstance(linear, Conv1D) else b @ a
            set_weight(linear, (weight.float() + added).to(weight.dtype))
        for name, weight in weights.items():
            a, b = (matrix.to(weight.device) for matrix in pairs[name])
            weight.copy_(weight.float() + experts[name].product(a, b))
        self.merged = folder

    def _experts_of(self, folder: str) -> dict[str, FusedExperts]:
        return find_fused_experts(self._base, read_json(Path(folder, CONFIG_FILE)).get("target_parameters") or [])

    def _read(
        self, folder: str, manifest_hash: str = "",
        check_limits: Callable[[int, Collection[str]], None] | None = None,
    ) -> LoraPairs:
        """Read a verified adapter by name and shape: of its config only rank and scaling have an effect.

        Raises AdapterError, before a tensor is read, when one does not fit its layer, and for an overflow. Before that
        `check_limits` is called with rank and layers.
        """
        saved, experts = read_json(Path(folder, CONFIG_FILE)), self._experts_of(folder)
        scale = saved["lora_alpha"] / (math.sqrt(saved["r"]) if saved.get("use_rslora") else saved["r"])
        names: dict[str, dict[str, str]] = {}
        with open_weights(Path(folder, WEIGHTS_FILE)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                match = LORA_TENSOR.fullmatch(name)
                assert match, "verification lets no other names through"
                _check_fit(match[1], match[2], file.get_slice(name).get_shape(), saved["r"], self._linears, experts)
                names.setdefault(match[1], {})[match[2]] = name
            if check_limits:
                if experts.keys() & names.keys() or any(EXPERT_LAYER in name for name in names):
                    raise AdapterError(EXPERTS_ALONE)
                check_limits(saved["r"], names.keys())
        # Not by the open file: each tensor that it returns leaves 64 bytes behind for good (safetensors 0.8).
        tensors = safetensors.torch.load(Path(folder, WEIGHTS_FILE).read_bytes())
        if manifest_hash:
            check_unchanged(folder, manifest_hash)
        pairs = {
            module: (tensors.pop(pair["A"]).float(), tensors.pop(pair["B"]).float() * scale)
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
        sizes = ((sum(linear_features(self._linears[name])), rank) for name, rank in ranks.items())
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
                linear, active = self._linears[name], lambda: self.add_lora
                self._layers[name] = MultiLoraLayer(linear, slots, ranks[name], self._like, active)
            for name, layer in self._layers.items():
                layer.set_slot(slot, pairs.get(name))
        except BaseException:  # such as no memory: the next request must not meet a part of the adapter
            self._evict(key)
            raise

    def _evict(self, key: str) -> None:
        self._loaded.pop(key)
        for name in self._layers.keys() - {name for adapter in self._loaded.values() for name in adapter.layers}:
            self._layers.pop(name).remove()


def _check_fit(
    module: str, side: str, shape: Sequence[int], rank: int, linears: dict[str, Any], experts: dict[str, FusedExperts],
) -> None:
    """Raise AdapterError where a matrix, `side` A or B, is for a layer that does not exist or has another size."""
    if module in experts:
        fused, features = experts[module], experts[module][2:4]
        rank *= fused.experts
    elif module in linears:
        features = linear_features(linears[module])
    else:
        raise AdapterError(f"it adapts {module!r}, which the base model does not have as a linear layer")
    expected = (rank, features[0]) if side == "A" else (features[1], rank)
    if tuple(shape) != expected:
        found, has = (" x ".join(map(str, size)) for size in (shape, expected))
        raise AdapterError(f"its matrix {side} for {module!r} has size {found}, the base model's layer has {has}")
