"""Attention over a packed row `[prefix][row 1]...[row B]`: every row sees the prefix (or its last tokens) and itself, and nothing else.

The template is equal for all rows of a phase, so its tokens go through the model once per batch instead of once per row.
Everything but attention is token-wise and needs no change; attention splits the packed row by its layout. Works with any transformers decoder
that dispatches to `ALL_ATTENTION_FUNCTIONS`, with gradient checkpointing and with ZeRO-3 (one ordinary forward call), and builds no (S, S) mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "pi_ray_shared_prefix"


@dataclass
class Layout:
    """Where the rows lie in a packed sequence of S = P + sum(L_b) tokens.

    visible: V, so many of the last prefix tokens are seen by the rows (all P, or gist tokens alone); gather: (B, L) int64, index of each row's token
    among the row tokens (clamped at its end); scatter: (S - P,) int64, place of each row token in the flattened (B, L) grid; mask: (L, V + L) bool,
    what a row's token may see.
    """

    prefix: int
    visible: int
    gather: torch.Tensor
    scatter: torch.Tensor
    mask: torch.Tensor

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
        return cls(prefix, visible, gather, scatter, mask)

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.prefix, self.visible, self.gather.to(device), self.scatter.to(device), self.mask.to(device))


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


def can_share_prefix(config: Any) -> str:
    """"" when a model of this config can take packed rows, else the reason why it gets plain batches."""
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return f"attention is limited to a sliding window of {window} tokens"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layers of type {', '.join(sorted(kinds - {'full_attention'}))} do not see the whole prompt"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are soft-capped"
    return ""


@contextmanager
def ordinary(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model attends as usual, with caches and masks, which generation needs."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def enable(model: torch.nn.Module) -> None:
    """Route the model's attention through `shared_prefix_attention`."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    model.set_attn_implementation(NAME)
