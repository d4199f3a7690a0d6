"""Attention of training on CPUs in bfloat16: SDPA's forward pass with a backward pass of matrix products.

torch's own backward pass of SDPA is slow there (`python -m tests.bench.prefix --dtype bfloat16`). Here the weights that
the forward pass saw are computed again, as exp(scores - logsumexp). The difference is taken inside the product, whose
sums are fp32, so that what is rounded to bfloat16 is small wherever a weight is large. Scores that are rounded before
it would be wrong by whole units, since the first token's are in the hundreds.

Rows behind a prefix attend to it all at once, in one product instead of one for each row's copy; their own tokens are
attended to apart, and both parts are weighed by their logsumexp, as in cascade inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# Attention weights: with fewer in a call SDPA is as fast; more at once take memory, since backward holds them all.
FEWEST, MOST = 1 << 16, 1 << 25
CAUSAL_BLOCK = 160  # queries of a causal mask whose gradients are computed at once


def takes_matrix_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, behind: int = 0
) -> bool:
    """Whether the functions here are for this call of a training update on a CPU.

    query (B, H, N, D), key (B, H_kv, M, D); `behind` is the length of a prefix that all rows see. Values of another
    width, as in multi-head latent attention, are left to SDPA.
    """
    fits = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape == value.shape
    learns, weights = torch.is_grad_enabled() and not dropout, _weights_of_row(query, behind + key.shape[2])
    return fits and learns and len(query) * weights >= FEWEST and weights <= MOST


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sees: torch.Tensor | None = None
) -> torch.Tensor:
    """query (B, H, N, D), key and value (B, H_kv, M, D), `sees` (N, M) bool or None for causal -> (B, H, N, D)."""
    bias = None if sees is None else _bias(sees, query.dtype)
    parts = _split_rows(key.shape[2], query, key, value)
    return torch.cat([_Attention.apply(*part, bias, scale) for part in parts])


def attend_behind(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix_key: torch.Tensor, prefix_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Rows that see a prefix (1, H_kv, P, D) and, by a causal mask, themselves: query (B, H, N, D), key and value
    (B, H_kv, N, D) -> (B, H, N, D). The prefix is multiplied with all rows at once; no row gets a copy of it.
    """
    parts = _split_rows(prefix_key.shape[2] + key.shape[2], query, key, value)
    return torch.cat([_AttentionBehind.apply(*part, prefix_key, prefix_value, scale) for part in parts])


def _split_rows(seen: int, *rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of rows (B, ...), the first one the query, in parts of about MOST attention weights to `seen` tokens."""
    at_once = max(1, MOST // _weights_of_row(rows[0], seen))
    return zip(*(x.split(at_once) for x in rows), strict=True)


def _weights_of_row(query: torch.Tensor, seen: int) -> int:
    """H * N * M"""
    return query.shape[1] * query.shape[2] * seen


def _bias(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To be added to scores: 0 where a token sees the other, else -inf."""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, -math.inf)


def _flash(query: Any, key: Any, value: Any, causal: bool, bias: Any, scale: float) -> Any:
    """SDPA's forward pass: output (B, H, N, D), and for the backward pass logsumexp (B, H, N) in fp32."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, scale: float) -> torch.Tensor:
        output, logsumexp = _flash(query, key, value, bias is None, bias, scale)
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


class _AttentionBehind(torch.autograd.Function):
    """Attention to the rows' own tokens and to the prefix, each alone and weighed by its logsumexp."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, prefix_key: Any, prefix_value: Any, scale: float) -> Any:
        near, near_sum = _flash(query, key, value, True, None, scale)
        far, far_sum = (
            _unflatten(x, len(query)) for x in _flash(_flatten(query), prefix_key, prefix_value, False, None, scale)
        )
        logsumexp = torch.logaddexp(near_sum, far_sum)
        shares = ((part - logsumexp).exp_()[..., None] for part in (near_sum, far_sum))
        output = sum(share * part for share, part in zip(shares, (near, far), strict=True)).to(query.dtype)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, output, logsumexp)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, prefix_key, prefix_value, output, logsumexp = ctx.saved_tensors
        rows = [query, logsumexp[..., None] / ctx.scale, output, grads[0]]
        causal = _bias(torch.ones(2 * [query.shape[2]], dtype=torch.bool).tril(), query.dtype)
        near = _gradients(rows, key, value, causal, ctx.scale)
        far = _gradients(list(map(_flatten, rows)), prefix_key, prefix_value, query.new_zeros(1), ctx.scale)
        return near[0] + _unflatten(far[0], len(query)), near[1], near[2], far[1], far[2], None


def _flatten(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, ...) -> (1, H, B * N, ...)"""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _unflatten(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(1, H, B * N, ...) -> (B, H, N, ...)"""
    return x[0].unflatten(1, (rows, -1)).transpose(0, 1)


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
