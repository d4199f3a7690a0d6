"""The next token of each row of a batch. What a row gets depends on its own logits, settings and random numbers alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pi_ray.protocols import GenerationRequest, Token

LIKELY = 1024  # tokens that are sorted first; a nucleus is seldom larger


@dataclass(frozen=True)
class Sampler:
    """How one row picks. A seed gives the same text in any batch."""

    temperature: float
    top_p: float
    logprobs: int | None
    random: random.Random = field(repr=False)

    @classmethod
    def of(cls, request: GenerationRequest) -> Sampler:
        seed = None if request.seed is None else request.seed % 2**64  # Random(-1) would be Random(1)
        return cls(request.temperature, request.top_p, request.logprobs, random.Random(seed))


def pick(logits: torch.Tensor, rows: Sequence[Sampler]) -> list[Token | None]:
    """(rows, vocabulary) -> one token for each row; None where the logits are not numbers."""
    most, best = logits.max(-1)
    ids, sound = best.tolist(), torch.isfinite(most).tolist()
    for places in _alike(rows, sound):
        for i, token in zip(places, _draw(logits[places], [rows[i] for i in places]), strict=True):
            ids[i] = token
    tokens: list[Token | None] = [Token(token) if ok else None for token, ok in zip(ids, sound, strict=True)]
    told = [i for i, row in enumerate(rows) if row.logprobs is not None and sound[i]]
    if told:
        for i, token in zip(told, _with_logprobs(logits[told], [ids[i] for i in told], [rows[i].logprobs or 0 for i in told]), strict=True):
            tokens[i] = token
    return tokens


def _alike(rows: Sequence[Sampler], sound: Sequence[bool]) -> list[list[int]]:
    """Places of the rows that sample: those without and those with a top_p."""
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0 and sound[i]]
    return [places for places in ([i for i in drawn if rows[i].top_p >= 1], [i for i in drawn if rows[i].top_p < 1]) if places]


def _draw(logits: torch.Tensor, rows: Sequence[Sampler]) -> list[int]:
    """One id a row, by where the row's random number falls among the cumulated probabilities."""
    heat, top_p, number = torch.tensor([[r.temperature, r.top_p, r.random.random()] for r in rows], dtype=torch.float64).to(logits.device).T[..., None]
    logits = logits.float()
    chances = torch.softmax((logits - logits.max(-1, keepdim=True).values) / heat.float().clamp(min=1e-6), -1)
    order = None
    if rows[0].top_p < 1:
        chances, order = _nucleus(chances, top_p)
    ends = chances.double().cumsum(-1)
    total = ends[:, -1:]
    place = torch.searchsorted(ends, torch.minimum(number * total, torch.nextafter(total, torch.zeros_like(total))), right=True)
    return (place if order is None else order.gather(-1, place))[:, 0].tolist()


def _nucleus(chances: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(chances, ids), likeliest first: zero beyond the smallest set that holds top_p, which always has the first one (Holtzman et al. 2020)."""
    size = chances.shape[-1]
    best, ids = chances.topk(min(LIKELY, size))
    if (best.double().sum(-1, keepdim=True) < top_p).any():
        best, ids = chances.sort(descending=True)
    before = best.double().cumsum(-1) - best
    return torch.where((before < top_p) | (torch.arange(best.shape[-1], device=best.device) == 0), best, 0), ids


def _with_logprobs(logits: torch.Tensor, ids: list[int], counts: list[int]) -> list[Token]:
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    values, order = (t.tolist() for t in logprobs.topk(min(max(counts), logits.shape[-1])))
    return [
        Token(token, value, tuple(zip(order[i][:count], values[i][:count], strict=True)))
        for i, (token, value, count) in enumerate(zip(ids, own, counts, strict=True))
    ]  # fmt: skip
