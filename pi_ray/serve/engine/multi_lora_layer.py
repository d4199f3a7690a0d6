"""A linear layer with the weights of several adapters, and the ways to add those of a batch's rows.

A decoding step takes two batched matrix products a layer, however many adapters take part: the rows of each adapter,
padded to the largest group, times the stacked A, times the stacked B (Punica, Chen 2023; S-LoRA, Sheng 2023).
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers, whose weight is (in, out)

BASE_SLOT = -1  # the slot of rows without an adapter
MAX_PADDING = 4  # padded places for each row, up to which one batched product is faster than adapters in turn
AddLora = Callable[["MultiLoraLayer", torch.Tensor, torch.Tensor], Any]  # (layer, input, output): adds to the output
Active = Callable[[], AddLora | None]  # how to add the adapters of the present batch; None where no row has one


class MultiLoraLayer:
    """Stacked weights of one linear layer: `a` (slots, rank, in), `b` (slots, rank, out), padded with zeros."""

    def __init__(self, linear: Any, slots: int, rank: int, like: dict[str, Any], active: Active):
        in_features, out_features = linear_features(linear)
        self.a = torch.zeros(slots, rank, in_features, **like)
        self.b = torch.zeros(slots, rank, out_features, **like)
        self._active = active
        self.remove = linear.register_forward_hook(self._hook).remove

    def _hook(self, module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if add_lora := self._active():
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


def choose_add_lora(slots: Sequence[int], tokens: int, device: Any) -> AddLora | None:
    """The fastest way to add the adapters of rows of `tokens` tokens; None where no row has one."""
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
        return _batched(groups, low, device)
    return _in_turn(slots)


def linear_features(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


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
