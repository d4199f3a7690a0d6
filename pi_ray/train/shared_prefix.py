"""Shared-prefix attention: rows packed as `[prefix][row 1]...[row B]` see the prefix and themselves, nothing else.

All rows of a phase have the same template, so its tokens go through the model once per batch instead of once per row.
Only attention differs from an ordinary forward pass: in every transformers decoder that dispatches to
`ALL_ATTENTION_FUNCTIONS`, with gradient checkpointing and with ZeRO-3. It is SDPA over the prefix, then over rows of
like lengths as padded batches, without an (S, S) mask, or on GPUs flex attention, one kernel over the packed sequence
that skips blocks in which nothing is seen.
Flex attention's mask and outputs are tested on CPUs, its speed is not measured yet. On CPUs in bfloat16 SDPA has a
backward pass of our own (cpu_attention.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from transformers import AttentionInterface

from pi_ray.errors import TrainingError
from pi_ray.train import cpu_attention
from pi_ray.train.block_mask import BLOCK, make_block_mask
from pi_ray.train.row_batch import RowBatch, row_batches

NAME, FLEX = "pi_ray_shared_prefix", "pi_ray_shared_prefix_flex"
SMALLEST_HEAD = 16  # dimensions of a head that flex attention's kernels take


@dataclass
class Layout:
    """Where the rows lie in a packed sequence of S = P + sum(L_b) tokens, and which tokens they see."""

    prefix: int  # P
    visible: int  # V: rows see the last V tokens of the prefix, all P or gist tokens alone
    lengths: tuple[int, ...]  # L_b
    segment: torch.Tensor  # (S,) int32: each token's row number, -1 in the prefix
    made: dict[Any, Any] = field(default_factory=dict)  # masks and row batches, once a forward pass needs them

    @classmethod
    def build(cls, prefix: int, lengths: Sequence[int], visible: int | None = None) -> Layout:
        segment = torch.repeat_interleave(torch.arange(-1, len(lengths)), torch.tensor([prefix, *lengths])).int()
        return cls(prefix, prefix if visible is None else visible, tuple(lengths), segment)

    def to(self, device: torch.device | str) -> Layout:
        return replace(self, segment=self.segment.to(device), made={})

    def visible_to(self, window: int | None) -> int:
        """Tokens at the end of the prefix of which a row sees any: with a sliding window no more than it reaches."""
        return self.visible if window is None else min(self.visible, window - 1)

    def row_batches(self) -> list[RowBatch]:
        if "batches" not in self.made:
            self.made["batches"] = row_batches(self.lengths, self.segment.device)
        return self.made["batches"]

    def row_mask(self, window: int | None) -> torch.Tensor:
        """(L, V' + L) bool of the longest row, V' = visible_to(window); a row of L_b tokens takes (L_b, V' + L_b)."""
        visible, longest = self.visible_to(window), max(self.lengths)
        return self._mask(("row", window), longest, visible + longest, visible, window)

    def prefix_mask(self, window: int | None) -> torch.Tensor | None:
        """(P, P) bool where a window is shorter than the prefix; None: a causal mask."""
        if window is None or window >= self.prefix:
            return None
        return self._mask(("prefix", window), self.prefix, self.prefix, 0, window)

    def _mask(self, key: Any, rows: int, columns: int, ahead: int, window: int | None) -> torch.Tensor:
        """Row i sees the columns up to i + ahead, the last `window` of them."""
        if key not in self.made:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=self.segment.device).tril(ahead)
            self.made[key] = mask if window is None else mask.triu(ahead - window + 1)
        return self.made[key]

    def mask_mod(self, window: int | None = None) -> Callable[..., torch.Tensor]:
        """Flex attention's mask_mod: whether the token at place `query` of the sequence sees the one at `key`."""
        begin, end, padding = self.prefix - self.visible, self.prefix, (0, -len(self.segment) % BLOCK)
        segment = F.pad(self.segment, padding, value=-2)  # kernels go over whole blocks
        own = torch.cat([torch.arange(n, device=segment.device) for n in self.lengths])
        position = F.pad(torch.cat([torch.arange(end, device=segment.device), own + end]), padding)

        def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            near = (key <= query) & ((segment[query] == segment[key]) | ((key >= begin) & (key < end)))
            return near if window is None else near & (position[query] - position[key] < window)

        return sees

    def block_mask(self, window: int | None = None) -> Any:
        """Flex attention's mask, made once for a batch and used by all layers of this window."""
        if ("blocks", window) not in self.made:
            places = (self.prefix, self.visible, self.lengths, window)
            self.made["blocks", window] = make_block_mask(*places, self.mask_mod(window), self.segment.device)
        return self.made["blocks", window]


def shared_prefix_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, layout: Layout | None = None, flex: bool = False, sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by SDPA, prefix and rows apart, or with `flex` by flex attention; without a layout by a causal mask.

    query (1, H, S, D), key and value (1, H_kv, S, D) -> output (1, S, H, D). Dropout and tiny heads are left to SDPA.
    A layer with a sliding window sees the last `sliding_window` tokens by their positions.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = partial(_sdpa, dropout=dropout, scale=scale)
    if layout is None:
        alone = Layout.build(query.shape[2], [0]).to(query.device) if sliding_window else None
        output = attend(query, key, value, alone.prefix_mask(sliding_window) if alone else None)
    elif flex and not dropout and query.shape[-1] >= SMALLEST_HEAD:
        kernel, grouped = _flex_attention(compiled=query.is_cuda), query.shape[1] != key.shape[1]
        blocks = layout.block_mask(sliding_window)
        output = kernel(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=grouped)
    else:
        p, v, mask = layout.prefix, layout.visible_to(sliding_window), layout.row_mask(sliding_window)
        batches = layout.row_batches()
        splits = (x.split([p, *(len(batch.place) for batch in batches)], dim=2) for x in (query, key, value))
        (head, *queries), (head_key, *keys), (head_value, *values) = splits
        seen_key, seen_value = head_key[:, :, p - v :], head_value[:, :, p - v :]
        outputs = [attend(head, head_key, head_value, layout.prefix_mask(sliding_window))] if p else []
        for batch, q, k, w in zip(batches, queries, keys, values, strict=True):
            n, (q, k, w) = batch.longest, map(batch.pad, (q, k, w))
            if v and not sliding_window and cpu_attention.takes_matrix_products(q, k, w, dropout, behind=v):
                found = cpu_attention.attend_behind(q, k, w, seen_key, seen_value, scale)
            else:
                sees = mask[:n, : v + n] if v or sliding_window else None
                k, w = (torch.cat([x.expand(len(q), -1, -1, -1), y], 2) for x, y in ((seen_key, k), (seen_value, w)))
                found = attend(q, k, w, sees)
            outputs.append(batch.unpad(found))
        output = torch.cat(outputs, 2)
    return output.transpose(1, 2).contiguous(), None


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor | None = None, *,
    dropout: float, scale: float,
) -> torch.Tensor:
    """SDPA where queries see what `sees` (N, M) says, or what a causal mask does."""
    if cpu_attention.takes_matrix_products(query, key, value, dropout):
        return cpu_attention.attend(query, key, value, scale, sees)
    return F.scaled_dot_product_attention(
        query, key, value, sees, dropout, is_causal=sees is None, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@cache
def _flex_attention(compiled: bool) -> Any:
    """torch's flex attention: compiled one kernel for any length; uncompiled, on CPUs, slow and without gradients."""
    attend = flex_attention.flex_attention
    return torch.compile(attend, dynamic=True) if compiled else attend


def uses_flex_attention(choice: str, device: str) -> bool:
    """Whether `train.attention` means flex attention here. Raises TrainingError where that has no gradients."""
    gpu = torch.device(device).type == "cuda"
    if choice == "flex" and not gpu:
        raise TrainingError(
            f"train.attention: flex trains on GPUs only, and this worker has {device}; take auto or sdpa"
        )
    return gpu and choice != "sdpa"


def why_prefix_cannot_be_shared(model: Any) -> str:
    """The reason why a base model's class or config rules out packed batches; "" leaves it to `packing_error`.

    Every layer must see the whole prompt or the last tokens of it.
    """
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} has an attention of its own, which cannot be exchanged"
    if reason := why_not_all_is_seen(model, 0):
        return reason
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    return ""


def why_not_all_is_seen(model: Any, longest: float) -> str:
    """The reason why some layer of a base model does not see all of `longest` tokens; "" where every layer does."""
    config = model.config.get_text_config()
    window = window_of(config)
    if window and window < longest:
        return f"attention is limited to a sliding window of {window} tokens, and rows have up to {longest:.0f}"
    seen_whole, types = {"full_attention", "sliding_attention" if window else ""}, getattr(config, "layer_types", None)
    if kinds := set(types or ()) - seen_whole:
        return f"layers of type {', '.join(sorted(kinds))} do not see the whole prompt"
    return "its layers keep a state in place of what they saw" if not types and _keeps_state(model) else ""


def window_of(config: Any) -> int:
    """Tokens that a layer with a sliding window sees; 0 where the model has none."""
    return (getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)) or 0


def _keeps_state(model: Any) -> bool:
    """Whether a base model has a state in place of attention: it takes one, or takes no attention mask."""
    takes = inspect.signature(type(model).forward).parameters
    return "state" in takes or "attention_mask" not in takes


@contextmanager
def ordinary_attention(model: Any) -> Iterator[None]:
    """A context in which the model attends by plain SDPA, with KV cache and masks, as generation needs."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def enable_shared_prefix(model: Any, flex: bool = False) -> None:
    """Route the model's attention through `shared_prefix_attention`, or through flex attention."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionInterface.register(FLEX, partial(shared_prefix_attention, flex=True))
    model.set_attn_implementation(FLEX if flex else NAME)
