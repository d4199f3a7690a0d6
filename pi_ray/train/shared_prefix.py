"""Attention over a packed row `[prefix][row 1]...[row B]`: every row sees the prefix (or its last tokens) and itself, and nothing else.

The template is equal for all rows of a phase, so its tokens go through the model once per batch instead of once per row.
Everything but attention is token-wise and needs no change; attention splits the packed row by its layout. Works with any transformers decoder
that dispatches to `ALL_ATTENTION_FUNCTIONS`, with gradient checkpointing and with ZeRO-3 (one ordinary forward call).

Two implementations of the same mask: SDPA row by row, with no padding and no (S, S) mask; and flex attention over the packed row as it is, one kernel that
skips the blocks in which nothing is seen. The second is what GPUs get. Its mask and its outputs are checked on CPU; its speed on a GPU is not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pi_ray.errors import TrainingError

NAME, FLEX = "pi_ray_shared_prefix", "pi_ray_shared_prefix_flex"
BLOCK = 128  # places of flex attention's blocks
SMALLEST_HEAD = 16  # dimensions of a head that flex attention's kernels take


@dataclass
class Layout:
    """Where the rows lie in a packed sequence of S = P + sum(L_b) tokens.

    visible: V, so many of the last prefix tokens are seen by the rows (all P, or gist tokens alone); mask: (L, V + L) bool for the longest row, what
    its tokens may see, of which a row of L_b tokens takes the corner (L_b, V + L_b); segment: (S,) int32, the number of each token's row, -1 in the prefix.
    """

    prefix: int
    visible: int
    lengths: tuple[int, ...]
    mask: torch.Tensor
    segment: torch.Tensor
    blocks: Any = None  # flex attention's mask, once a forward pass has asked for it

    @classmethod
    def build(cls, prefix: int, lengths: Sequence[int], visible: int | None = None) -> Layout:
        visible, longest = prefix if visible is None else visible, max(lengths)
        mask = torch.ones(longest, visible + longest, dtype=torch.bool).tril(visible)
        segment = torch.repeat_interleave(torch.arange(-1, len(lengths)), torch.tensor([prefix, *lengths])).int()
        return cls(prefix, visible, tuple(lengths), mask, segment)

    def to(self, device: torch.device | str) -> Layout:
        return replace(self, mask=self.mask.to(device), segment=self.segment.to(device), blocks=None)

    def sees(self) -> Callable[..., torch.Tensor]:
        """Whether the token at place `query` sees the one at `key`, as flex attention's mask_mod."""
        begin, end = self.prefix - self.visible, self.prefix
        segment = F.pad(self.segment, (0, -len(self.segment) % BLOCK), value=-2)  # kernels go over whole blocks

        def mask_mod(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & ((segment[query] == segment[key]) | ((key >= begin) & (key < end)))

        return mask_mod

    def block_mask(self) -> Any:
        """Made once for each batch, and used by all layers."""
        if self.blocks is None:
            from torch.nn.attention.flex_attention import create_block_mask

            size = len(self.segment)
            self.blocks = create_block_mask(self.sees(), None, None, size, size, device=str(self.segment.device))
        return self.blocks


def shared_prefix_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, layout: Layout | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, H, S, D), key and value (1, H_kv, S, D) -> output (1, S, H, D). Without a layout: ordinary causal attention."""
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    options = {"dropout_p": dropout, "scale": scaling, **grouped}
    if layout is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options).transpose(1, 2).contiguous(), None
    p, v = layout.prefix, layout.visible
    (head, *queries), (head_key, *keys), (head_value, *values) = (x.split([p, *layout.lengths], dim=2) for x in (query, key, value))
    seen_key, seen_value = head_key[:, :, p - v :], head_value[:, :, p - v :]
    found = [F.scaled_dot_product_attention(head, head_key, head_value, is_causal=True, **options)] if p else []
    for n, q, k, w in zip(layout.lengths, queries, keys, values, strict=True):
        sees = {"attn_mask": layout.mask[:n, : v + n]} if v else {"is_causal": True}
        found.append(F.scaled_dot_product_attention(q, torch.cat([seen_key, k], 2), torch.cat([seen_value, w], 2), **sees, **options))
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


def flex_shared_prefix_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, layout: Layout | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:
    """As `shared_prefix_attention`, by flex attention. What its kernels do not take (dropout, tiny heads, rows without a layout) goes the other way."""
    if layout is None or dropout or query.shape[-1] < SMALLEST_HEAD:
        return shared_prefix_attention(module, query, key, value, attention_mask, dropout, scaling, layout)
    out = _flex(query.is_cuda)(query, key, value, block_mask=layout.block_mask(), scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


@cache
def _flex(compiled: bool) -> Any:
    """Compiled it is one kernel for sequences of any length; uncompiled, on a CPU, it is slow and has no gradients."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def wants_flex(choice: str, device: str) -> bool:
    """Whether `train.attention` (auto, sdpa, flex) means flex attention on this device. Raises TrainingError where it has no gradients."""
    gpu = torch.device(device).type == "cuda"
    if choice == "flex" and not gpu:
        raise TrainingError(f"train.attention: flex trains on GPUs only, and this worker has {device}; take auto or sdpa")
    return gpu and choice != "sdpa"


def can_share_prefix(model: torch.nn.Module, longest: float = 0) -> str:
    """"" when a base model can take packed rows, by what its class and config say, else the reason why it gets plain batches.

    `longest`: tokens of the longest row with its prefix. A sliding window that holds them all is full attention. What computes otherwise, `batches.differs` finds.
    """
    config = model.config.get_text_config()
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} has an attention of its own, which cannot be exchanged"
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if window and window < longest:
        return f"attention is limited to a sliding window of {window} tokens, and rows have up to {longest:.0f}"
    if kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention" if window else ""}:
        return f"layers of type {', '.join(sorted(kinds))} do not see the whole prompt"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    return ""


@contextmanager
def ordinary(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model attends as usual, with caches and masks, which generation needs."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def enable(model: torch.nn.Module, flex: bool = False) -> None:
    """Route the model's attention through `shared_prefix_attention`, or through flex attention."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionInterface.register(FLEX, flex_shared_prefix_attention)
    model.set_attn_implementation(FLEX if flex else NAME)
