"""Greedy batch generation for evaluation: the shared prefix is computed once, rows leave the batch as they end.

Not here: serving's engine, which streams and samples (serving/engines.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from pi_ray.models import last


def prefix_cache(model: Any, prefix: Sequence[int]) -> DynamicCache:
    """Keys and values of the prefix, batch 1."""
    cache = DynamicCache()
    if prefix:
        _forward(model, torch.tensor([list(prefix)], device=model.device), None, None, cache)
    return cache


@torch.inference_mode()
def greedy(model: Any, prefix: Sequence[int], rows: Sequence[Sequence[int]], max_new_tokens: int, end: int | None, cache: DynamicCache | None = None) -> list[list[int]]:
    """Answer ids of each row (without `end`), temperature 0. `cache` is that of the prefix, when it is at hand; it is not changed.

    A cache that holds fewer tokens holds the prefix's last ones (gist tokens): rows see these alone, and stand where they stand behind the whole.
    Rows are padded on the left between prefix and row; position ids and mask leave the padding out, so a row's ids do not depend on its batch
    (up to rounding).
    """
    cache = copy.deepcopy(prefix_cache(model, prefix) if cache is None else cache)
    longest, size, held = max(map(len, rows)), len(rows), cache.get_seq_length()
    if len(prefix):
        cache.batch_repeat_interleave(size)
    ids = torch.tensor([[0] * (longest - len(r)) + list(r) for r in rows], device=model.device)
    mask = torch.tensor([[1] * held + [0] * (longest - len(r)) + [1] * len(r) for r in rows], device=model.device)
    answers: list[list[int]] = [[] for _ in rows]
    alive = list(range(size))
    for _ in range(max_new_tokens):
        positions = len(prefix) - held + (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        picked = _forward(model, ids, mask, positions, cache).argmax(-1).tolist()
        keep = [i for i, token in enumerate(picked) if token != end]
        if not keep:
            break
        for i in keep:
            answers[alive[i]].append(picked[i])
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=mask.device)
            cache.batch_select_indices(index)
            mask = mask[index]
            alive = [alive[i] for i in keep]
        ids = torch.tensor([[picked[i]] for i in keep], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(keep), 1)], -1)
    return answers


def latency(model: Any, prefix: Sequence[int], row: Sequence[int], new_tokens: int, fill: Callable[[], DynamicCache] | None = None) -> tuple[float, float]:
    """Seconds of one request of exactly `new_tokens` tokens: (whole prompt computed, prefix read from a cache).

    `fill` computes the cache where rows do not see the whole prefix.
    """
    started = time.perf_counter()
    if fill:
        greedy(model, prefix, [row], new_tokens, end=None, cache=fill())
    else:
        greedy(model, [], [[*prefix, *row]], new_tokens, end=None)
    whole = time.perf_counter() - started
    cache = fill() if fill else prefix_cache(model, prefix)
    started = time.perf_counter()
    greedy(model, prefix, [row], new_tokens, end=None, cache=cache)
    return whole, time.perf_counter() - started


@torch.inference_mode()
def _forward(model: Any, ids: torch.Tensor, mask: Any, positions: Any, cache: DynamicCache) -> torch.Tensor:
    """Logits after the last token, (rows, vocabulary)."""
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last(1, ids.device)).logits[:, -1]
