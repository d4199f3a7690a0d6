"""Attention of training on CPUs in bfloat16: SDPA's forward pass with a backward pass of matrix products.

torch's own backward pass of SDPA is slow there (`python -m tests.bench.prefix --dtype bfloat16`). Here the weights that
the forward pass saw are computed again, as exp(scores - logsumexp). The difference is taken inside the product, whose
sums are fp32, so that what is rounded to bfloat16 is small wherever a weight is large. Scores that are rounded before
it would be wrong by whole units, since the first token's are in the hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

# Attention weights: with fewer in a call SDPA is as fast; more at once take memory, since backward holds them all.
FEWEST, MOST = 1 << 16, 1 << 25
CAUSAL_BLOCK = 160  # queries of a causal mask whose gradients are computed at once


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
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, bias is None, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, logsumexp, bias)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, output, logsumexp, bias = ctx.saved_tensors
        grad, subtracted = grads[0], logsumexp[..., None] / ctx.scale
        if bias is not None:
            return *_gradients((query, subtracted, output, grad), key, value, bias, ctx.scale), None, None
        grad_query, grad_key, grad_value = query.new_empty(query.shape), torch.zeros_like(key), torch.zeros_like(value)
        for begin in range(0, query.shape[2], CAUSAL_BLOCK):  # nothing is computed of most that a causal mask hides
            end = min(begin + CAUSAL_BLOCK, query.shape[2])
            rows = [x[:, :, begin:end] for x in (query, subtracted, output, grad)]
            sees = _bias(torch.ones(end - begin, end, dtype=torch.bool).tril(begin), query.dtype)
            found = _gradients(rows, key[:, :, :end], value[:, :, :end], sees, ctx.scale)
            grad_query[:, :, begin:end] = found[0]
            grad_key[:, :, :end] += found[1]
            grad_value[:, :, :end] += found[2]
        return grad_query, grad_key, grad_value, None, None


def _gradients(rows: Sequence[torch.Tensor], key: Any, value: Any, bias: torch.Tensor, scale: float) -> Any:
    """Gradients of query, key (B, H_kv, M, D) and value, from `rows` (B, H, N, ...): query, logsumexp / scale, output
    and its gradient."""
    (batch, heads, n, _), (kv_heads, m) = rows[0].shape, key.shape[1:3]
    groups = batch * kv_heads  # queries with the same keys

    def fold(x: torch.Tensor) -> torch.Tensor:
        """(B, H, N, X) -> (B * H_kv, H / H_kv * N, X): heads with the same keys one after another."""
        return x.reshape(groups, heads // kv_heads * n, x.shape[-1])

    (query, subtracted, output, grad), key, value = map(fold, rows), key.flatten(0, 1), value.flatten(0, 1)
    scores = _product_less(query, key, subtracted)
    weights = torch.add(bias, scores.view(groups, -1, n, m), alpha=scale).exp_().view(scores.shape)
    grad_value = weights.transpose(1, 2) @ grad
    mean = (grad.float() * output).sum(-1, keepdim=True)
    grad_scores = _product_less(grad, value, mean).mul_(weights)
    grad_query = (grad_scores @ key).mul_(scale).view(batch, heads, n, -1)
    grad_key = (grad_scores.transpose(1, 2) @ query).mul_(scale).view(batch, kv_heads, m, -1)
    return grad_query, grad_key, grad_value.view(grad_key.shape)


def _product_less(rows: torch.Tensor, columns: torch.Tensor, less: torch.Tensor) -> torch.Tensor:
    """rows (G, N, D) times columns (G, M, D), less an fp32 number (G, N, 1) for each row, rounded once -> (G, N, M)."""
    high = less.to(rows.dtype)
    low = (less - high).to(rows.dtype)
    minus = columns.new_full((*columns.shape[:2], 1), -1.0)
    return torch.cat([rows, high, low], -1) @ torch.cat([columns, minus, minus], -1).transpose(1, 2)
