"""Attention over a packed row `[prefix][row 1]...[row B]`: every row sees the prefix (or its last tokens) and itself, and nothing else.

The template is equal for all rows of a phase, so its tokens go through the model once per batch instead of once per row.
Everything but attention is token-wise and needs no change; attention splits the packed row by its layout. Works with any transformers decoder
that dispatches to `ALL_ATTENTION_FUNCTIONS`, with gradient checkpointing and with ZeRO-3 (one ordinary forward call).

Two implementations of the same mask: SDPA over rows padded to one length, with no (S, S) mask; and flex attention over the packed row as it is, one kernel that
skips the blocks in which nothing is seen. The second is what GPUs get. Its mask and its outputs are checked on CPU; its speed on a GPU is not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

    visible: V, so many of the last prefix tokens are seen by the rows (all P, or gist tokens alone); gather: (B, L) int64, index of each row's token
    among the row tokens (clamped at its end); scatter: (S - P,) int64, place of each row token in the flattened (B, L) grid; mask: (L, V + L) bool,
    what a row's token may see; segment: (S,) int32, the number of each token's row, -1 in the prefix.
    """

    prefix: int
    visible: int
    gather: torch.Tensor
    scatter: torch.Tensor
    mask: torch.Tensor
    segment: torch.Tensor
    blocks: Any = None  # flex attention's mask, once a forward pass has asked for it

    @classmethod
    def build(cls, prefix: int, lengths: list[int], visible: int | None = None) -> Layout:
        visible = prefix if visible is None else visible
        longest = max(lengths)
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        offsets = torch.arange(longest)
        size = torch.tensor(lengths)
        gather = starts[:, None] + torch.minimum(offsets[None], size[:, None] - 1)
        scatter = torch.cat([row * longest + offsets[:n] for row, n in enumerate(lengths)])
        mask = torch.cat([torch.ones(longest, visible, dtype=torch.bool), torch.ones(longest, longest, dtype=torch.bool).tril()], dim=1)
        segment = torch.repeat_interleave(torch.arange(-1, len(lengths)), torch.tensor([prefix, *lengths])).int()
        return cls(prefix, visible, gather, scatter, mask, segment)

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.prefix, self.visible, *(x.to(device) for x in (self.gather, self.scatter, self.mask, self.segment)))

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
    rows, longest = layout.gather.shape

    def padded(x: torch.Tensor) -> torch.Tensor:  # (1, H, S, D) -> (B, H, L, D)
        return x[0, :, p:][:, layout.gather].transpose(0, 1)

    def with_prefix(x: torch.Tensor) -> torch.Tensor:  # (1, H, S, D) -> (B, H, V + L, D)
        return torch.cat([x[:, :, p - v : p].expand(rows, -1, -1, -1), padded(x)], dim=2)

    out = F.scaled_dot_product_attention(padded(query), with_prefix(key), with_prefix(value), attn_mask=layout.mask, **options)
    out = out.transpose(1, 2).reshape(rows * longest, *out.shape[1::2])[layout.scatter][None]
    if p:
        head = F.scaled_dot_product_attention(query[:, :, :p], key[:, :, :p], value[:, :, :p], is_causal=True, **options)
        out = torch.cat([head.transpose(1, 2), out], dim=1)
    return out.contiguous(), None


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
