"""Generation for a batch of rows behind one prefix, whose keys and values are computed once.

Teacher, evaluation and often the student generate greedily, a writer of queries samples. All rows start together and
leave as they end, with no scheduling or streaming, so a row's answer depends on its batch by rounding alone. Models in
which a layer does not see all tokens get rows of equal length together, which need no padding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from pi_ray.models import cache_argument, last_logits_index
from pi_ray.models.device import synchronize
from pi_ray.train.cached_prefix import (
    CachedPrefix,
    KeysValues,
    attends_to_cached_prefix,
    base_of,
    cached_prefix_enabled,
    check_decoding,
    continues_cache,
    keys_and_values,
    shares_cached_prefix,
)
from pi_ray.train.row_chains import Chain, chains_pay, find_chains, read_chains
from pi_ray.train.shared_prefix import why_not_all_is_seen

SHARING_ROWS, COPYING_ROWS = 64, 16


def compute_prefix_cache(model: Any, prefix: Sequence[int]) -> DynamicCache:
    """Keys and values of the prefix, batch 1."""
    cache = DynamicCache(config=base_of(model).config)
    if prefix:
        ids = torch.tensor([list(prefix)], device=model.device)
        keep, argument = last_logits_index(1, ids.device), cache_argument(base_of(model).__class__)
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=keep, **{argument: cache})
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
    it. They are padded on the left, between prefix and row, where mask and position ids leave the padding out. What
    the turns of one conversation have in common is read once too (row_chains.py).
    """
    cache = compute_prefix_cache(model, prefix) if cache is None else cache
    limited = _is_limited(model, len(prefix) + max(map(len, rows)) + max_new_tokens)
    if limited:
        check_decoding(model)
    if limited and len(groups := _equally_long(rows)) > 1:
        found: list[list[int]] = [[] for _ in rows]
        for group in groups:
            own, mine = [rows[i] for i in group], partial(_choose_for, choose, group)
            written = generate(model, prefix, own, max_new_tokens, end, cache, breaks, mine)
            for i, answer in zip(group, written, strict=True):
                found[i] = answer
        return found
    if limited and prefix and not continues_cache(model):
        rows, prefix, cache = [[*prefix, *row] for row in rows], [], compute_prefix_cache(model, [])
    if not limited and chains_pay(rows, chains := find_chains(rows)) and attends_to_cached_prefix(model, cache):
        behind, rows = _RowCache.behind_chains(model, len(prefix), cache, rows, chains)
    else:
        behind = _RowCache(model, len(prefix), cache, len(rows), limited)
    ids, mask = _pad_left(rows, model.device)
    answers: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    with behind.attention():
        for _ in range(max_new_tokens):
            tokens = choose(behind.forward(ids, mask, 1)[:, -1], alive)
            for i, token in enumerate(tokens):
                if token != end:
                    answers[alive[i]].append(token)
            keep = [i for i, token in enumerate(tokens) if token != end and not _ends_line(answers[alive[i]], breaks)]
            if not keep:
                break
            if len(keep) < len(alive):
                index = torch.tensor(keep, device=mask.device)
                behind.keep_rows(index)
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
    limited = _is_limited(model, len(prefix) + max(len(prompt) + len(label) for prompt, label in rows))
    fed = [[*prompt, *label[:-1]] for prompt, label in rows]
    if limited and len(groups := _equally_long(fed)) > 1:
        known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in groups:
            each = label_logprobs(model, prefix, [rows[i] for i in group], cache)
            known.update(zip(group, each, strict=True))
        return [known[i] for i in range(len(rows))]
    if limited and prefix and not continues_cache(model):
        fed, prefix, cache = [[*prefix, *ids] for ids in fed], [], compute_prefix_cache(model, [])
    ids, mask = _pad_left(fed, model.device)
    behind = _RowCache(model, len(prefix), cache, len(rows), limited)
    with behind.attention():
        logits = behind.forward(ids, mask, max(len(label) for _, label in rows))
    found = []
    for row, (_, label) in zip(logits, rows, strict=True):
        logprobs = torch.log_softmax(row[-len(label) :].float(), -1)
        asked = torch.tensor(list(label), device=ids.device)
        found.append((logprobs.gather(1, asked[:, None])[:, 0].cpu(), (logprobs.argmax(-1) == asked).cpu()))
    return found


def cut_answer(ids: Sequence[int], end: int | None, breaks: Collection[int]) -> list[int]:
    """The answer that `generate` gives where another engine wrote `ids`: it ends where `generate` stops."""
    answer: list[int] = []
    for token in ids:
        if token == end:
            break
        answer.append(token)
        if _ends_line(answer, breaks):
            break
    return answer


def _ends_line(answer: Sequence[int], breaks: Collection[int]) -> bool:
    return answer[-1] in breaks and any(token not in breaks for token in answer)


def request_seconds(
    model: Any, prefix: Sequence[int], row: Sequence[int], new_tokens: int, cache: DynamicCache | None = None,
    fill: Callable[[], DynamicCache] | None = None,
) -> float:
    """Seconds of one request of `new_tokens` tokens. Without the prefix's cache all of it is computed in this time, a
    gist cache by `fill`. A GPU ends before what it had to do; the request ends with a token on the host.
    """
    synchronize(model.device)
    started = time.perf_counter()
    if fill and cache is None:
        cache = fill()
    if cache is None:
        generate_greedy(model, [], [[*prefix, *row]], new_tokens, None)
    else:
        generate_greedy(model, prefix, [row], new_tokens, None, cache)
    return time.perf_counter() - started


def _choose_for(choose: Choose, numbers: Sequence[int], logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
    return choose(logits, [numbers[row] for row in rows])


def _equally_long(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of rows of each length."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    return list(groups.values())


def _select_rows(cache: DynamicCache, index: Any) -> None:
    """Keep these rows of a cache, or repeat some; layers that keep a state have this method alone."""
    for layer in cache.layers:
        layer.reorder_cache(index)


def rows_at_once(model: Any, cache: DynamicCache) -> int:
    """Rows that are answered together: fewer where each of them needs a copy of the prefix's cache."""
    return SHARING_ROWS if shares_cached_prefix(model, cache) else COPYING_ROWS


def _is_limited(model: Any, tokens: int) -> bool:
    """Whether some layer does not see all tokens: padding would take places of its window or change its state."""
    return bool(why_not_all_is_seen(base_of(model), tokens))


class _RowCache:
    """The KV cache of a batch of rows behind a cached prefix, which the model reads once for all rows if it can.

    Where it cannot, each row has a copy of the prefix's keys and values.
    """

    def __init__(self, model: Any, prefix: int, cache: DynamicCache, rows: int, limited: bool):
        self.model, self.copied, self.limited = model, 0, limited
        self.places = torch.full((rows, 1), prefix, device=model.device)  # of each row's first own token
        self.shared = list[KeysValues]()
        self.seen: torch.Tensor | None = None  # (B, P) bool: what each row sees of the shared tokens; None: all
        self.own = DynamicCache()
        if not limited and shares_cached_prefix(model, cache):
            self.shared = keys_and_values(cache)
        else:
            self.own, self.copied = copy.deepcopy(cache), 0 if limited else cache.get_seq_length()
            if prefix and rows > 1:
                _select_rows(self.own, torch.zeros(rows, dtype=torch.long, device=model.device))

    @classmethod
    def behind_chains(
        cls, model: Any, prefix: int, cache: DynamicCache, rows: Sequence[Sequence[int]], chains: Sequence[Chain]
    ) -> tuple[_RowCache, list[Sequence[int]]]:
        """The cache of rows that lie in chains, and what is still to be read of each of them."""

        def read(ids: Sequence[int]) -> list[KeysValues]:
            alone = cls(model, prefix, cache, 1, limited=False)
            with alone.attention():
                alone.forward(*_pad_left([ids], model.device), 1)
            return keys_and_values(alone.own)

        found = read_chains(rows, chains, keys_and_values(cache), read)
        behind = cls(model, prefix, cache, len(rows), limited=False)
        behind.shared, behind.seen = found.layers, found.seen
        behind.places += torch.tensor(found.skipped, device=model.device)[:, None]
        return behind, [row[n:] for row, n in zip(rows, found.skipped, strict=True)]

    def attention(self) -> AbstractContextManager[None]:
        """The context in which `forward` is called."""
        return cached_prefix_enabled(self.model) if self.shared else nullcontext()

    def keep_rows(self, index: torch.Tensor) -> None:
        _select_rows(self.own, index)
        self.places = self.places[index]
        self.seen = None if self.seen is None else self.seen[index]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits (B, keep, V) after the last of the newest tokens `ids` (B, L).

        `mask` (B, T) is 1 at own tokens, the newest among them, and 0 at padding.
        """
        positions = self.places + (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        seen: dict[str, Any] = {}
        if not self.limited:  # else there is no padding
            seen = {"attention_mask": F.pad(mask, (self.copied, 0), value=1)}
        if self.shared:
            seen = {"cached_prefix": CachedPrefix.build(self.shared, mask, ids.shape[1], self.seen)}
        return self.model(
            input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=last_logits_index(keep, ids.device),
            **{cache_argument(base_of(self.model).__class__): self.own}, **seen,
        ).logits


def _pad_left(rows: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, L) and mask (B, L) of rows that end together."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
