"""Which KV cache a model takes: a trial at start compares a batch with rows alone."""

import logging
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from pi_ray.errors import ModelError
from pi_ray.models import cache_argument, last_logits_index
from pi_ray.serve.engine.hybrid_cache import CONV, RECURRENT, HybridKVCache, Key
from pi_ray.serve.engine.kv_cache import KVCache, reaches
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.serve.engine.multi_lora_layer import BASE_SLOT
from pi_ray.serve.engine.unbatched_cache import UnbatchedCache

log = logging.getLogger("ray.serve")
KNOWN_LAYERS = {
    DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}
# Longest window or chunk that the trial at start is long enough to cross.
CROSSED = {"cpu": 1024, "mps": 1024, "cuda": 8192}
# Largest rounding difference between two ways to compute the same logits, as a part of their standard deviation.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@torch.inference_mode()
def create_kv_cache(model: Any, multi_lora: MultiLora) -> KVCache | UnbatchedCache:
    """A KVCache where the model computes with it what it computes by itself, else an UnbatchedCache.

    Raises ModelError for a model that does not even go on from a cache of its own kind.
    """
    trial, tolerance = _trial_prompts(model), TOLERANCE.get(model.dtype, 0.1)
    expected = _logits_without_cache(model, multi_lora, trial)
    unbatched = UnbatchedCache(model, multi_lora)
    if not (difference := _difference(_logits(unbatched, trial), expected)) < tolerance:
        raise ModelError(
            f"{type(model).__name__} cannot be served: with its cache it computes something else (logits "
            f"{difference:.2g} of their spread apart); take another model.base"
        )
    try:
        batched = _batched_cache(model, multi_lora)
        difference = _difference(_logits(batched, trial), expected)
        if difference < tolerance:
            return batched
        reason = f"logits differ by {difference:.2g} of their spread"
    except Exception as error:
        reason = str(error)
    effect = "its answers are computed one after the other, without a prefix cache"
    log.warning("this model cannot be batched token by token (%s): %s", reason, effect)
    return unbatched


def _batched_cache(model: Any, multi_lora: MultiLora) -> KVCache:
    """Raises ValueError for a model that keeps something else than keys and values, and states."""
    cache = DynamicCache(config=model.config)
    multi_lora.set_active_slots([BASE_SLOT], 1)
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=ids, use_cache=True, **{cache_argument(model.__class__): cache})
    if other := {type(layer).__name__ for layer in cache.layers if type(layer) not in KNOWN_LAYERS}:
        raise ValueError(f"it has layers that keep something else than keys and values: {', '.join(sorted(other))}")
    attending = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)}
    keys, values = ({i: getattr(layer, name) for i, layer in attending.items()} for name in ("keys", "values"))
    if not keys:
        raise ValueError("none of its layers keeps keys and values")
    if (states := _states_of(cache)) or len(attending) < len(cache.layers):
        return HybridKVCache(model, multi_lora, keys, values, states)
    return KVCache(model, multi_lora, list(keys.values()), list(values.values()))


def _states_of(cache: Any) -> dict[Key, torch.Tensor]:
    """The states that layers keep, as the model has made them."""
    found: dict[Key, torch.Tensor] = {}
    for layer, kept in enumerate(cache.layers):
        for kind, states in ((CONV, "conv_states"), (RECURRENT, "recurrent_states")):
            made = {} if not isinstance(kept, LinearAttentionLayer) else getattr(kept, states)
            found |= {(layer, kind, number): state for number, state in made.items() if state is not None}
    return found


def _trial_prompts(model: Any) -> tuple[list[int], list[int]]:
    """A prompt that crosses windows and chunks, where that is not too long, and a short one."""
    config, device = model.config.get_text_config(), model.device.type
    crossed = [reach for reach in reaches(config) if 0 < reach <= CROSSED.get(device, CROSSED["cpu"])]
    longest = max([7, *(reach + 5 for reach in crossed)])
    long, short = ([(start + 7 * i) % config.vocab_size for i in range(n)] for start, n in ((11, longest), (5, 3)))
    return long, short


def _logits_without_cache(model: Any, multi_lora: MultiLora, trial: tuple[list[int], list[int]]) -> torch.Tensor:
    """(4, vocabulary): after both prompts, and after one more token of each."""
    found = []
    for ids in (*trial, *([*prompt, prompt[1]] for prompt in trial)):
        multi_lora.set_active_slots([BASE_SLOT], len(ids))
        keep = last_logits_index(1, model.device)
        out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=keep)
        found.append(out.logits[0, -1])
    return torch.stack(found).float()


def _logits(cache: KVCache | UnbatchedCache, trial: tuple[list[int], list[int]]) -> torch.Tensor:
    """The same with a cache that has both rows; where it may, it reads the first prompt in two pieces, and in between
    the row leaves and begins again, as by the prefix cache.
    """
    long, short = trial
    slots = [BASE_SLOT, BASE_SLOT]
    cache.add_rows(2)
    if cache.chunked_prefill:
        cache.forward(0, [long[:2]], slots[:1])
        if cache.keeps_blocks:
            block, states = cache.copy_block(0, 0, 2), cache.copy_states(0)
            for _ in slots:
                cache.pop_row()
            cache.add_rows(2)
            cache.load_blocks(0, [block], states)
    prompts = cache.forward(0, [long[cache.lengths[0] :], short], slots)
    more = cache.forward(0, [[prompt[1]] for prompt in trial], slots)
    for _ in slots:
        cache.pop_row()
    return torch.cat([prompts, more]).float()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, over the standard deviation."""
    return ((found - expected).abs().max() / expected[0].std()).item()
