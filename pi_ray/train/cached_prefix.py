"""Attention of many rows to the cached keys and values of one prefix, of which no row gets a copy.

Generation reads the cache once a step for the whole batch instead of once for every row, so that its memory and time
hardly grow with the prefix. As in training (shared_prefix.py) only attention differs from an ordinary forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from pi_ray.errors import ModelError
from pi_ray.models import cache_argument
from pi_ray.train.shared_prefix import why_prefix_cannot_be_shared

NAME = "pi_ray_cached_prefix"
# A prefix and rows, of ids that any vocabulary has, on which both ways are compared; and the largest difference of
# logits that is rounding, as a share of their spread. In half precision a mixture of experts may choose other experts.
PROBE_PREFIX, PROBE_ROWS = [7, 3, 9, 2], [[5, 11, 4, 8], [12, 6]]
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.2
OTHER_SCORES = {"s_aux", "softcap", "position_bias"}  # arguments of attention that would be left out here

KeysValues = tuple[torch.Tensor, torch.Tensor]  # of one layer, each (1, H_kv, tokens, D)

_proven: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # model -> whether it computes the same in this way
_continues: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # model -> whether it reads on behind a cache
_decodes: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # model -> whether it reads one token behind a cache


@dataclass(frozen=True)
class CachedPrefix:
    """The prefix that the attention of every layer gets beside the rows' own tokens."""

    layers: Sequence[KeysValues]  # of each layer, of the prefix's P tokens
    sees: torch.Tensor  # (B, L, T) bool: which of a row's own T tokens each of its newest L sees
    seen: torch.Tensor | None = None  # (B, P) bool: which of the prefix's tokens each row sees; None: all

    @classmethod
    def build(
        cls, layers: Sequence[KeysValues], mask: torch.Tensor, newest: int, seen: torch.Tensor | None = None
    ) -> CachedPrefix:
        """`mask` (B, T) tells own tokens from padding."""
        own = mask.bool()[:, None, :].expand(-1, newest, -1)
        causal = torch.ones(newest, mask.shape[1], dtype=torch.bool, device=mask.device)
        return cls(layers, own & causal.tril(mask.shape[1] - newest), seen)


def keys_and_values(cache: DynamicCache) -> list[KeysValues]:
    """Keys and values of each layer of a cache; an empty list where nothing was read yet."""
    layers: list[Any] = list(cache.layers)
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def cached_prefix_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, cached_prefix: CachedPrefix | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to the prefix and to own tokens: query (B, H, L, D), key and value (B, H_kv, T, D) -> (B, L, H, D).

    One token a row is multiplied with the prefix as it is, all rows at once, in fp32 up to the softmax as SDPA does:
    the first token's scores are in the hundreds, where bfloat16 has whole numbers only. Several are left to SDPA, which
    needs keys and values of equal batch; that copy of the prefix lasts for one layer.
    """
    if cached_prefix is None or OTHER_SCORES & {name for name, value in more.items() if value is not None}:
        raise NotImplementedError(f"{type(module).__name__} computes its scores in a way of its own")
    prefix_key, prefix_value = cached_prefix.layers[module.layer_idx]
    own = cached_prefix.sees.to(query.device)  # layers may lie on several GPUs
    (size, heads, length, depth), groups, cached = query.shape, key.shape[1], prefix_key.shape[2]
    if length > 1:
        keys = torch.cat([prefix_key.expand(size, -1, -1, -1), key], 2)
        values = torch.cat([prefix_value.expand(size, -1, -1, -1), value], 2)
        sees, grouped = F.pad(own, (cached, 0), value=True), heads != groups
        if cached_prefix.seen is not None:
            sees[..., :cached] = cached_prefix.seen.to(query.device)[:, None]
        output = F.scaled_dot_product_attention(query, keys, values, sees[:, None], scale=scaling, enable_gqa=grouped)
        return output.transpose(1, 2).contiguous(), None
    scaled = query.float().view(size, groups, heads // groups, depth) * (scaling or depth**-0.5)

    def times_prefix(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """(B, H_kv, n, X) times (H_kv, X, Y), all rows of a head in one product -> (B, H_kv, n, Y)."""
        product = rows.transpose(0, 1).reshape(groups, -1, rows.shape[-1]) @ matrix
        return product.view(groups, size, -1, matrix.shape[-1]).transpose(0, 1)

    far = times_prefix(scaled, prefix_key[0].float().transpose(1, 2))
    if cached_prefix.seen is not None:
        far = far.masked_fill(~cached_prefix.seen.to(query.device)[:, None, None], -torch.inf)
    near = (scaled @ key.float().transpose(2, 3)).masked_fill(~own[:, None], -torch.inf)
    weights = torch.cat([far, near], -1).softmax(-1)
    output = times_prefix(weights[..., :cached], prefix_value[0].float()) + weights[..., cached:] @ value.float()
    return output.to(query.dtype).reshape(size, 1, heads, -1), None


AttentionInterface.register(NAME, cached_prefix_attention)


def base_of(model: Any) -> Any:
    """The transformers model in a peft model, or the model itself."""
    return getattr(model, "get_base_model", lambda: model)()


@contextmanager
def cached_prefix_enabled(model: Any) -> Iterator[None]:
    """A context in which every forward pass of the model gets a `cached_prefix` and attends by it."""
    inner = base_of(model)
    attention = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(attention)


def shares_cached_prefix(model: Any, cache: DynamicCache) -> bool:
    """Whether rows of the model share this cache, which is not empty."""
    return bool(cache.get_seq_length()) and attends_to_cached_prefix(model, cache)


def attends_to_cached_prefix(model: Any, cache: DynamicCache) -> bool:
    """Whether the model may attend in this way: full attention in every layer, and proven equal on two short rows.

    `cache` is one that the model has filled, or will.
    """
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    if model not in _proven:
        try:
            _proven[model] = not why_prefix_cannot_be_shared(base_of(model)) and _is_equal(model)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, IndexError):  # such as keys that are cached compressed
            _proven[model] = False
    return _proven[model]


def continues_cache(model: Any) -> bool:
    """Whether a row that is read behind the cache of a prefix computes what both compute in one piece.

    Some recurrent layers read several tokens at once only at the start.
    """
    if model not in _continues:
        _continues[model] = _is_right_behind_cache(model, PROBE_ROWS[0])
    return _continues[model]


def check_decoding(model: Any) -> None:
    """Raise ModelError for a model that does not even read one token behind its cache."""
    if model not in _decodes:
        _decodes[model] = continues_cache(model) or _is_right_behind_cache(model, PROBE_ROWS[0][:1])
    if not _decodes[model]:
        name = type(base_of(model)).__name__
        raise ModelError(f"{name} cannot generate: with its cache it computes something else; take another model.base")


@torch.inference_mode()
def _is_right_behind_cache(model: Any, tokens: Sequence[int]) -> bool:
    """Whether these tokens, read at once behind the cache of PROBE_PREFIX, have the logits that they have without it.
    """
    prefix, row = (torch.tensor([list(ids)], device=model.device) for ids in (PROBE_PREFIX, tokens))
    try:
        cache = {cache_argument(base_of(model).__class__): DynamicCache(config=base_of(model).config)}
        model(input_ids=prefix, use_cache=True, **cache)
        positions = torch.arange(len(PROBE_PREFIX), len(PROBE_PREFIX) + row.shape[1], device=model.device)[None]
        found = model(input_ids=row, use_cache=True, position_ids=positions, **cache).logits[0]
        whole = model(input_ids=torch.cat([prefix, row], 1), use_cache=False).logits[0, len(PROBE_PREFIX) :]
        return _is_rounding(model, found, whole)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False


def _is_rounding(model: Any, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits differ by rounding alone."""
    expected, tolerance = expected.float(), TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
    return ((found.float() - expected).norm() / (expected - expected.mean()).norm()).item() < tolerance


@torch.inference_mode()
def _is_equal(model: Any) -> bool:
    longest, device = max(map(len, PROBE_ROWS)), model.device
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in PROBE_ROWS], device=device)
    own = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROBE_ROWS], device=device)
    positions = (own.cumsum(-1) - 1).clamp(min=0) + len(PROBE_PREFIX)
    prefix, argument = torch.tensor([PROBE_PREFIX], device=device), cache_argument(base_of(model).__class__)
    cache, found, kept = DynamicCache(), [], DynamicCache()
    model(input_ids=prefix, use_cache=True, **{argument: cache})
    with cached_prefix_enabled(model):
        for end in (longest - 1, longest):  # all tokens but the last of each row together, then the last one alone
            part = slice(kept.get_seq_length(), end)
            shared = CachedPrefix.build(keys_and_values(cache), own[:, :end], end - part.start)
            found.append(model(
                input_ids=ids[:, part], position_ids=positions[:, part], use_cache=True, cached_prefix=shared,
                **{argument: kept},
            ).logits)
    expected = torch.cat([
        model(input_ids=torch.tensor([PROBE_PREFIX + row], device=device)).logits[0, len(PROBE_PREFIX) :]
        for row in PROBE_ROWS
    ])
    return _is_rounding(model, torch.cat(found, 1)[own.bool()], expected)
