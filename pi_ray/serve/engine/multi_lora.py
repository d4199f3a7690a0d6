"""LoRA adapters beside one base model, at different rows of one batch: in every linear layer their matrices lie in one stack.

The products of a decoding step take two batched matrix multiplications a layer, however many adapters take part: the rows of each adapter, padded
to the largest group, times the stack of all A, times the stack of all B (cf. Punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from pi_ray.errors import AdapterError
from pi_ray.serve.engine.lora_weights import Matrices, linears, read
from pi_ray.serve.engine.onednn_linear import set_weight, weight_of

BASE = -1  # the slot of rows that want no adapter
PADDING = 4  # places for a row, up to which padded groups are quicker than one adapter after the other
Products = Callable[["Layer", torch.Tensor, torch.Tensor], None]


class Layer:
    """The stacks of one linear layer: `a` (slots, rank, in) and `b` (slots, rank, out), zero where an adapter has a smaller rank or none."""

    def __init__(self, linear: torch.nn.Linear, slots: int, rank: int, like: dict[str, Any], stack: AdapterStack):
        self.a = torch.zeros(slots, rank, linear.in_features, **like)
        self.b = torch.zeros(slots, rank, linear.out_features, **like)
        self._stack = stack
        self.remove = linear.register_forward_hook(self._add).remove

    def _add(self, module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if products := self._stack.products:
            products(self, inputs[0].reshape(-1, self.a.shape[2]), output.view(-1, self.b.shape[2]))

    def put(self, slot: int, pair: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.a[slot].zero_()
        self.b[slot].zero_()
        if pair:
            a, b = pair
            self.a[slot, : len(a)].copy_(a)
            self.b[slot, : len(a)].copy_(b.T)

    def resize(self, slots: int, rank: int) -> None:
        s, r = min(slots, self.a.shape[0]), min(rank, self.a.shape[1])
        for name in ("a", "b"):
            old = getattr(self, name)
            new = old.new_zeros(slots, rank, old.shape[2])
            new[:s, :r] = old[:s, :r]
            setattr(self, name, new)


class AdapterStack:
    """At most `limit` adapters in memory, the least recently used dropped first. One thread calls it.

    `use` says which adapter each row of the next forward pass of `base` has. Memory grows with what is loaded, in slots and in rank.
    """

    def __init__(self, base: Any, limit: int):
        self.limit = limit
        self.products: Products | None = None
        self.merged = ""
        self.hits = self.misses = self.evictions = 0
        self._linears = linears(base)
        self._like = {"dtype": base.dtype, "device": base.device}
        self._slots: OrderedDict[str, int] = OrderedDict()  # folder -> slot, least recently used first
        self._held: dict[str, tuple[int, Collection[str]]] = {}  # folder -> its rank and the layers that it adapts
        self._layers: dict[str, Layer] = {}
        self._shape = (0, 0)  # slots, rank
        self._used: Any = None

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in list(self._layers.values()) for t in (layer.a, layer.b))

    def fits(self, folder: str, busy: Collection[str]) -> bool:
        """Whether `folder` can be loaded without dropping an adapter of `busy`."""
        return not folder or bool(self.merged) or folder in self._slots or len(set(busy) - {""}) < self.limit

    @torch.inference_mode()
    def load(self, folder: str, busy: Collection[str] = ()) -> int:
        """The slot of `folder`, which is in memory from now on ("" is the bare base). Raises AdapterError when it does not fit the base model."""
        if self.merged:
            return self._merged_slot(folder)
        if not folder:
            return BASE
        if folder in self._slots:
            self.hits += 1
        else:
            self.misses += 1
            matrices = self._read(folder)
            idle = [f for f in self._slots if f not in busy]
            for old in idle[: max(0, len(self._slots) + 1 - self.limit)]:
                self._drop(old)
            self._place(folder, matrices)
        self._slots.move_to_end(folder)
        return self._slots[folder]

    def use(self, slots: Sequence[int], tokens: int) -> None:
        """Rows of the next forward pass: `slots[i]` (of `load`, or BASE) is the adapter of row i, of `tokens` tokens each."""
        asked = (tuple(slots), tokens, self._shape)
        if asked != self._used:
            self.products, self._used = self._plan(slots, tokens), asked

    @torch.no_grad()
    def merge(self, folder: str) -> None:
        """Add `folder` into the base weights, for good. From now on it alone is served. Raises AdapterError when that cannot be."""
        pairs = self._read(folder).pairs
        odd = next((name for name in pairs if not self._linears[name].weight.is_floating_point()), None)
        if odd:
            raise AdapterError("an adapter cannot be merged into quantised weights; leave serve.merge or model.quantize out")
        for name, (a, b) in pairs.items():
            linear = self._linears[name]
            weight = weight_of(linear)
            set_weight(linear, (weight.float() + b.to(weight.device) @ a.to(weight.device)).to(weight.dtype))
        self.merged = folder

    def _merged_slot(self, folder: str) -> int:
        if folder != self.merged:
            raise AdapterError(f"this server has one adapter merged into the base model (serve.merge) and serves it alone; {'no other one' if folder else 'not the bare base'}")
        return BASE

    def _read(self, folder: str) -> Matrices:
        matrices = read(folder, self._linears)
        for name, (a, b) in matrices.pairs.items():
            if not (torch.isfinite(a.to(self._like["dtype"])).all() and torch.isfinite(b.to(self._like["dtype"])).all()):
                raise AdapterError(f"its matrices for {name!r} with their scaling are too large for {self._like['dtype']}")
        return matrices

    def _place(self, folder: str, matrices: Matrices) -> None:
        slot = min(set(range(self.limit)) - set(self._slots.values()))
        self._held[folder] = (matrices.rank, matrices.pairs.keys())
        self._slots[folder] = slot
        self._resize()
        for name in matrices.pairs.keys() - self._layers.keys():
            self._layers[name] = Layer(self._linears[name], *self._shape, self._like, self)
        for name, layer in self._layers.items():
            layer.put(slot, matrices.pairs.get(name))

    def _resize(self) -> None:
        """Room for the slots that are taken (doubling, so that it seldom changes) and for the largest rank among them."""
        slots = min(1 << max(self._slots.values()).bit_length(), self.limit)
        shape = max(slots, self._shape[0]), max(rank for rank, _ in self._held.values())
        if shape != self._shape:
            self._shape = shape
            for layer in self._layers.values():
                layer.resize(*shape)

    def _drop(self, folder: str) -> None:
        self.evictions += 1
        self._slots.pop(folder)
        self._held.pop(folder)
        for name in self._layers.keys() - {name for _, held in self._held.values() for name in held}:
            self._layers.pop(name).remove()

    def _plan(self, slots: Sequence[int], tokens: int) -> Products | None:
        """How the products of these rows are computed; None where no row has an adapter."""
        used = set(slots) - {BASE}
        if not used:
            return None
        if len(set(slots)) == 1:
            return _alone(slots[0])
        if tokens > 1:
            return _in_turn(_runs(slots), len(slots))
        low, high = min(used), max(used) + 1
        groups = [[row for row, own in enumerate(slots) if own == slot] for slot in range(low, high)]
        if len(groups) * max(map(len, groups)) <= PADDING * len(slots):
            return _at_once(groups, low, self._like["device"])
        return _in_turn(_runs(slots), len(slots))


def _alone(slot: int) -> Products:
    return lambda layer, x, out: out.addmm_(F.linear(x, layer.a[slot]), layer.b[slot])


def _runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """(slot, first row, end) of neighbours with the same adapter."""
    runs, start = [], 0
    for slot, rows in groupby(slots):
        end = start + len(list(rows))
        if slot != BASE:
            runs.append((slot, start, end))
        start = end
    return runs


def _in_turn(runs: Sequence[tuple[int, int, int]], rows: int) -> Products:
    """One run after the other, in place; for prompts, whose rows are sorted and hold many tokens."""

    def products(layer: Layer, x: torch.Tensor, out: torch.Tensor) -> None:
        each = len(x) // rows  # the output layer sees one token of a row
        for slot, start, end in runs:
            part = slice(start * each, end * each)
            out[part].addmm_(F.linear(x[part], layer.a[slot]), layer.b[slot])

    return products


def _at_once(groups: Sequence[Sequence[int]], low: int, device: Any) -> Products:
    """All groups in one batched product; `groups[i]` are the rows of slot low + i, of one token each. The padding repeats row 0 and is dropped."""
    size, high = max(map(len, groups)), low + len(groups)
    padded = torch.tensor([[*group, *[0] * (size - len(group))] for group in groups]).flatten().to(device)
    rows, places = torch.tensor(sorted((row, i * size + j) for i, group in enumerate(groups) for j, row in enumerate(group))).T.contiguous().to(device)
    everyone = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) == rows[-1] - rows[0] + 1 else None  # neighbours are added at once

    def products(layer: Layer, x: torch.Tensor, out: torch.Tensor) -> None:
        inner = torch.bmm(x.index_select(0, padded).view(len(groups), size, -1), layer.a[low:high].transpose(1, 2))
        found = torch.bmm(inner, layer.b[low:high]).flatten(0, 1).index_select(0, places)
        if everyone:
            out[everyone].add_(found)
        else:
            out.index_add_(0, rows, found)

    return products
