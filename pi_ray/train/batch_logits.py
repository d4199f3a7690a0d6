"""Forward passes of batches, and the proof at start that a model computes in each kind what it does in plain ones.

A packed batch (shared_prefix.py) takes one pass. A suffix batch takes two: the prefix goes through the model once and
leaves its cache, behind which every row goes on. That is for models whose layers cannot look at packed rows: recurrent
layers and convolutions, which leave a state, chunked attention, and attentions that cannot be exchanged. Keys, values
and states of the prefix stay in the graph, so that one backward pass reaches it from all rows (gradient_cache.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pi_ray.models import cache_argument, last_logits_index
from pi_ray.train import shared_prefix
from pi_ray.train.batches import Batch, packed_batch, plain_batch, suffix_batch, to_device
from pi_ray.train.cached_prefix import base_of
from pi_ray.train.gradient_cache import GradientCache

# A prefix and two rows, of ids that any vocabulary has, on which packed and plain batches are compared.
PROBE_PREFIX, PROBE_ROWS = [7, 3, 9, 2], [([5, 11, 4, 8, 13, 6], [10, 3]), ([12, 6, 9], [4, 14, 7, 2, 11])]
# Largest difference of logits that is rounding, as a share of their spread. In half precision a mixture of experts
# may choose other experts.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.2
NO_CACHE = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError)


def run_batch(model: Any, batch: Batch) -> torch.Tensor:
    """The logits of a batch, (1, N, V) or (B, K, V)."""
    rows = dict(batch.inputs)
    if "prefix_ids" not in rows:
        return model(**rows).logits
    base, prefix = base_of(getattr(model, "module", model)), rows.pop("prefix_ids")
    cache, argument = GradientCache(base.config), cache_argument(base.__class__)
    if prefix.numel():
        keep = last_logits_index(1, prefix.device)
        model(input_ids=prefix, use_cache=True, logits_to_keep=keep, **{argument: cache})
        cache.expand(len(rows["input_ids"]))
    return model(**rows, use_cache=True, **{argument: cache}).logits


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """(N, V) at the answer tokens of a batch, row by row."""
    return run_batch(model, batch).flatten(0, -2)[batch.labels != -100]


@torch.no_grad()
def packing_error(model: Any, device: str, flex: bool, longest: int = 0) -> str:
    """Switch `model` to packed batches, unless their logits differ from a plain batch's; returns how much, or "".

    `longest`: tokens of the longest row with its prefix. What is compared crosses a sliding window that is shorter.
    """
    inner = getattr(model, "module", model)
    attention = inner.config._attn_implementation
    model.eval()
    prefix = _probe_prefix(inner.config.get_text_config(), longest)
    expected = answer_logits(model, to_device(plain_batch(prefix, PROBE_ROWS), device))
    shared_prefix.enable_shared_prefix(inner, flex)
    difference = answer_logits(model, to_device(packed_batch(prefix, PROBE_ROWS), device)) - expected
    model.train()
    share = (difference.float().norm() / (expected - expected.mean()).float().norm()).item()
    if share < (TOLERANCE if expected.dtype == torch.float32 else HALF_TOLERANCE):
        return ""
    inner.set_attn_implementation(attention)
    return f"in packed rows it computes something else (logits {share:.2g} of their spread apart)"


def _probe_prefix(config: Any, longest: int) -> list[int]:
    reaches = (shared_prefix.window_of(config), getattr(config, "attention_chunk_size", None) or 0)
    more = max(reach - len(PROBE_PREFIX) + 2 if reach < longest else 0 for reach in reaches)
    return [*PROBE_PREFIX, *(2 + (i * i) % 13 for i in range(more))]


def suffix_error(model: Any, device: str, longest: int = 0) -> str:
    """Why a model does not compute in suffix batches what it computes in plain ones, gradients included; "" if it does.

    `longest` is as in `packing_error`.
    """
    inner = getattr(model, "module", model)
    prefix = _probe_prefix(inner.config.get_text_config(), longest)
    inner.eval()
    try:
        found, expected = (
            _logits_and_gradient(inner, to_device(pack(prefix, PROBE_ROWS), device))
            for pack in (suffix_batch, plain_batch)
        )
    except torch.OutOfMemoryError:
        raise
    except NO_CACHE as error:
        return f"it cannot go on from a cache: {str(error).splitlines()[0] if str(error) else repr(error)}"
    finally:
        inner.train()
    for name, ours, theirs in zip(("logits", "gradients"), found, expected, strict=True):
        share = ((ours - theirs).norm() / (theirs - theirs.mean()).norm().clamp(min=1e-12)).item()
        if not share < (TOLERANCE if inner.dtype == torch.float32 else HALF_TOLERANCE):
            return f"behind a cache it computes something else ({name} {share:.2g} of their spread apart)"
    return ""


def _logits_and_gradient(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    logits = answer_logits(model, batch).float()
    labels = batch.labels[batch.labels != -100]
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:  # a frozen teacher
        return logits.detach(), torch.zeros(1)
    grads = torch.autograd.grad(F.cross_entropy(logits, labels), weights, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, grads, strict=True)]
    return logits.detach(), torch.cat([grad.float().flatten() for grad in flat])
