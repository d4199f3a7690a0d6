"""Sampling: each sequence's next token, which depends on its own logits, settings and random numbers alone."""

import random
from collections.abc import Callable, Sequence

import torch

from pi_ray.protocols import GenerationRequest, Token

PARTIAL_SORT = 1024  # tokens that are sorted first; a nucleus is seldom larger


class Sampler:
    """The sampling settings of one sequence. A seed gives the same tokens in any batch."""

    def __init__(self, request: GenerationRequest):
        self.temperature, self.top_p, self.logprobs = request.temperature, request.top_p, request.logprobs
        seed = None if request.seed is None else request.seed % 2**64  # Random(-1) would be Random(1)
        self.random = random.Random(seed)


def sample_tokens(
    logits: torch.Tensor, samplers: Sequence[Sampler], unmasked: torch.Tensor | None = None
) -> list[Token | None]:
    """Logits (sequences, vocabulary) -> one token for each sequence; None where the logits are not finite.

    Where some are masked, log-probabilities are those of the `unmasked` ones, which the model gave.
    """
    highest, argmax = logits.max(-1)
    ids, finite = argmax.tolist(), torch.isfinite(highest).tolist()
    for nucleus in (False, True):
        rows = [i for i, s in enumerate(samplers) if finite[i] and s.temperature > 0 and (s.top_p < 1) == nucleus]
        if rows:
            for i, drawn in zip(rows, _draw(logits[rows], [samplers[i] for i in rows], nucleus), strict=True):
                ids[i] = drawn
    tokens: list[Token | None] = [Token(token) if ok else None for token, ok in zip(ids, finite, strict=True)]
    counts = {i: s.logprobs for i, s in enumerate(samplers) if s.logprobs is not None and finite[i]}
    if rows := list(counts):
        of_model = logits if unmasked is None else unmasked
        told = _with_logprobs(of_model[rows], [ids[i] for i in rows], list(counts.values()))
        for i, token in zip(rows, told, strict=True):
            tokens[i] = token
    return tokens


def choose_sampled(samplers: Sequence[Sampler], end: int) -> Callable[[torch.Tensor, Sequence[int]], list[int]]:
    """How `generate` chooses by the samplers of its rows; `end` where logits are not finite."""

    def choose(logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        return [token.id if token else end for token in sample_tokens(logits, [samplers[i] for i in rows])]

    return choose


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler], nucleus: bool) -> list[int]:
    """One id for each row, found where its random number falls among the cumulated probabilities."""
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    settings = torch.tensor([[s.temperature, s.top_p, s.random.random()] for s in samplers], dtype=torch.float64)
    temperature, top_p, number = settings.to(logits.device).T[..., None]
    logits = logits.float()
    shifted = logits - logits.max(-1, keepdim=True).values
    probabilities = torch.softmax(shifted / temperature.float().clamp(min=1e-6), -1)
    probabilities, order = _nucleus(probabilities, top_p) if nucleus else (probabilities, None)
    cumulated = probabilities.double().cumsum(-1)
    total = cumulated[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    place = torch.searchsorted(cumulated, torch.minimum(number * total, below_total), right=True)
    return (place if order is None else order.gather(-1, place))[:, 0].tolist()


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, ids), likeliest first, zero beyond the smallest set that holds top_p (Holtzman et al. 2020)."""
    best, ids = probabilities.topk(min(PARTIAL_SORT, probabilities.shape[-1]))
    if (best.double().sum(-1, keepdim=True) < top_p).any():
        best, ids = probabilities.sort(descending=True)
    likelier = best.double().cumsum(-1) - best
    return torch.where((likelier < top_p) | (torch.arange(best.shape[-1], device=best.device) == 0), best, 0), ids


def _with_logprobs(logits: torch.Tensor, ids: list[int], counts: list[int]) -> list[Token]:
    """Tokens with their log-probability and that of the `counts[i]` likeliest."""
    logprobs = torch.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    values, order = (t.tolist() for t in logprobs.topk(min(max(counts), logits.shape[-1])))
    return [
        Token(token, value, tuple(zip(order[i][:count], values[i][:count], strict=True)))
        for i, (token, value, count) in enumerate(zip(ids, chosen, counts, strict=True))
    ]
