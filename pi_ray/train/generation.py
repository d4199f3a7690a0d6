"""Generation for a batch of rows behind one prefix, whose keys and values are computed once.

Teacher, evaluation and often the student generate greedily, a writer of queries samples. All rows start together and
leave as they end, with no scheduling or streaming, so a row's answer depends on its batch by rounding alone.
"""

import copy
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from pi_ray.models import last_logits_index


def compute_prefix_cache(model: Any, prefix: Sequence[int]) -> DynamicCache:
    """Keys and values of the prefix, batch 1."""
    cache = DynamicCache()
    if prefix:
        _forward(model, torch.tensor([list(prefix)], device=model.device), None, None, cache)
    return cache


Choose = Callable[[torch.Tensor, Sequence[int]], list[int]]  # (logits (n, V), which rows they are of) -> n next tokens


def generate_greedy(
    model: Any, prefix: Sequence[int], rows: Sequence[Sequence[int]], max_new_tokens: int, end: int | None,
    cache: DynamicCache | None = None, breaks: Collection[int] = (),
) -> list[list[int]]:
    """As `generate`, with the likeliest token at each place."""
    return generate(model, prefix, rows, max_new_tokens, end, cache, breaks)


@torch.inference_mode()
def generate(
    model: Any, prefix: Sequence[int], rows: Sequence[Sequence[int]], max_new_tokens: int, end: int | None,
    cache: DynamicCache | None = None, breaks: Collection[int] = (),
    choose: Choose = lambda logits, rows: logits.argmax(-1).tolist(),
) -> list[list[int]]:
    """Answer ids of each row, without `end`. `cache` is the prefix's, if known; it is not changed.

    An answer that has begun also ends with a token of `breaks`.

    Rows see of the prefix what the cache holds, such as its gist tokens alone, and keep their positions behind all of
    it. They are padded on the left, between prefix and row, where mask and position ids leave the padding out.
    """
    cache = copy.deepcopy(compute_prefix_cache(model, prefix) if cache is None else cache)
    longest, size, cached = max(map(len, rows)), len(rows), cache.get_seq_length()
    if len(prefix):
        cache.batch_repeat_interleave(size)
    ids = torch.tensor([[0] * (longest - len(r)) + list(r) for r in rows], device=model.device)
    mask = torch.tensor([[1] * cached + [0] * (longest - len(r)) + [1] * len(r) for r in rows], device=model.device)
    answers: list[list[int]] = [[] for _ in rows]
    alive = list(range(size))
    for _ in range(max_new_tokens):
        positions = len(prefix) - cached + (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        tokens = choose(_forward(model, ids, mask, positions, cache), alive)
        for i, token in enumerate(tokens):
            if token != end:
                answers[alive[i]].append(token)
        keep = [i for i, token in enumerate(tokens) if token != end and not _ends_line(answers[alive[i]], breaks)]
        if not keep:
            break
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=mask.device)
            cache.batch_select_indices(index)
            mask = mask[index]
            alive = [alive[i] for i in keep]
        ids = torch.tensor([[tokens[i]] for i in keep], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(keep), 1)], -1)
    return answers


@torch.inference_mode()
def label_logprobs(
    model: Any, prefix: Sequence[int], rows: Sequence[tuple[Sequence[int], Sequence[int]]], cache: DynamicCache
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each row (prompt ids, label ids) behind the cached prefix, at each token of its label: the log-probability,
    and whether the model holds it likeliest. `cache` is not changed.
    """
    cache, cached = copy.deepcopy(cache), cache.get_seq_length()
    if len(prefix):
        cache.batch_repeat_interleave(len(rows))
    fed = [[*prompt, *label[:-1]] for prompt, label in rows]
    longest, longest_label = max(map(len, fed)), max(len(label) for _, label in rows)
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in fed], device=model.device)
    mask = torch.tensor([[1] * cached + [0] * (longest - len(r)) + [1] * len(r) for r in fed], device=model.device)
    positions = len(prefix) - cached + (mask.cumsum(-1) - 1).clamp(min=0)[:, -longest:]
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=last_logits_index(longest_label, ids.device),
    ).logits
    found = []
    for row, (_, label) in zip(logits, rows, strict=True):
        logprobs = torch.log_softmax(row[-len(label) :].float(), -1)
        asked = torch.tensor(list(label), device=ids.device)
        found.append((logprobs.gather(1, asked[:, None])[:, 0].cpu(), (logprobs.argmax(-1) == asked).cpu()))
    return found


def _ends_line(answer: Sequence[int], breaks: Collection[int]) -> bool:
    return answer[-1] in breaks and any(token not in breaks for token in answer)


def request_seconds(
    model: Any, prefix: Sequence[int], row: Sequence[int], new_tokens: int,
    fill: Callable[[], DynamicCache] | None = None,
) -> tuple[float, float]:
    """Seconds of one request of `new_tokens` tokens: (prefix computed, prefix cached). `fill` computes a gist cache."""
    started = time.perf_counter()
    if fill:
        generate_greedy(model, prefix, [row], new_tokens, None, fill())
    else:
        generate_greedy(model, [], [[*prefix, *row]], new_tokens, None)
    uncached = time.perf_counter() - started
    cache = fill() if fill else compute_prefix_cache(model, prefix)
    started = time.perf_counter()
    generate_greedy(model, prefix, [row], new_tokens, None, cache)
    return uncached, time.perf_counter() - started


@torch.inference_mode()
def _forward(model: Any, ids: torch.Tensor, mask: Any, positions: Any, cache: DynamicCache) -> torch.Tensor:
    """Logits after the last token, (rows, vocabulary)."""
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=last_logits_index(1, ids.device),
    ).logits[:, -1]
