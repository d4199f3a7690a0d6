"""Attention of training on CPUs in bfloat16: SDPA's forward pass with a backward pass of matrix products.

torch's own backward pass of SDPA is slow there (`python -m tests.bench.prefix --dtype bfloat16`). Here the weights that
the forward pass saw are computed again, as exp(scores - logsumexp). The difference is taken inside the product, whose
sums are fp32, so that what is rounded to bfloat16 is small wherever a weight is large. Scores that are rounded before
it would be wrong by whole units, since the first token's are in the hundreds.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# Attention weights: with fewer in a call SDPA is as fast; more at once take memory, since backward holds them all.
FEWEST, MOST = 1 << 16, 1 << 25


def takes_matrix_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether `attend` is for this call: query (B, H, N, D) and key (B, H_kv, M, D) of a training update on a CPU.

    Values of another width, as in multi-head latent attention, are left to SDPA.
    """
    fits = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape == value.shape
    learns, weights = torch.is_grad_enabled() and not dropout, _weights_of_row(query, key)
    return fits and learns and len(query) * weights >= FEWEST and weights <= MOST


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sees: torch.Tensor | None = None
) -> torch.Tensor:
    """query (B, H, N, D), key and value (B, H_kv, M, D), `sees` (N, M) bool or None for causal -> (B, H, N, D)."""
    bias = None if sees is None else _bias(sees, query.dtype)
    at_once = max(1, MOST // _weights_of_row(query, key))
    parts = zip(*(x.split(at_once) for x in (query, key, value)), strict=True)
    return torch.cat([_Attention.apply(*part, bias, scale) for part in parts])


def _weights_of_row(query: torch.Tensor, key: torch.Tensor) -> int:
    """H * N * M"""
    return query.shape[1] * query.shape[2] * key.shape[2]


def _bias(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To be added to scores: 0 where a token sees the other, else -inf."""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, -math.inf)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, scale: float) -> torch.Tensor:
        shared = query.shape[1] // key.shape[1]  # heads that have the same keys
        keys, values = (x.repeat_interleave(shared, 1) for x in (key, value))
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, bias is None, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, logsumexp, bias)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, output, logsumexp, bias = ctx.saved_tensors
        (rows, heads, n, _), (_, kv_heads, m, _) = query.shape, key.shape
        groups = rows * kv_heads  # queries with the same keys

        def fold(x: torch.Tensor) -> torch.Tensor:
            """(B, H, N, X) -> (B * H_kv, H / H_kv * N, X): heads with the same keys one after another."""
            return x.reshape(groups, heads // kv_heads * n, x.shape[-1])

        if bias is None:
            bias = _bias(torch.ones(n, m, dtype=torch.bool).tril(), query.dtype)
        grad, query, key, value = fold(grads[0]), fold(query), key.flatten(0, 1), value.flatten(0, 1)
        scores = _product_less(query, key, fold(logsumexp[..., None]) / ctx.scale)
        weights = torch.add(bias, scores.view(groups, -1, n, m), alpha=ctx.scale).exp_().view(scores.shape)
        grad_value = weights.transpose(1, 2) @ grad
        mean = (grad.float() * fold(output)).sum(-1, keepdim=True)
        grad_scores = _product_less(grad, value, mean).mul_(weights)
        grad_query = (grad_scores @ key).mul_(ctx.scale).view(rows, heads, n, -1)
        grad_key = (grad_scores.transpose(1, 2) @ query).mul_(ctx.scale).view(rows, kv_heads, m, -1)
        return grad_query, grad_key, grad_value.view(grad_key.shape), None, None


def _product_less(rows: torch.Tensor, columns: torch.Tensor, less: torch.Tensor) -> torch.Tensor:
    """rows (G, N, D) times columns (G, M, D), less an fp32 number (G, N, 1) for each row, rounded once -> (G, N, M)."""
    high = less.to(rows.dtype)
    low = (less - high).to(rows.dtype)
    minus = columns.new_full((*columns.shape[:2], 1), -1.0)
    return torch.cat([rows, high, low], -1) @ torch.cat([columns, minus, minus], -1).transpose(1, 2)
