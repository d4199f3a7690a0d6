"""Answers with the likeliest tokens along them: generated, or given and judged in several views of the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pi_ray.train.anchor import AnchorRows
from pi_ray.train.batch_logits import answer_logits
from pi_ray.train.batches import Pack, PhaseDataset, to_device
from pi_ray.train.generation import generate, rows_at_once
from pi_ray.train.teacher_rows import TeacherRows

LEAST_NOTED, NOTED_TIMES = 64, 4  # tokens noted at each place of an answer as it is generated: these times top_k

Answers = Mapping[int, list[int]]  # row number -> label ids


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens at each of L places of an answer, by the view that generated it."""

    ids: torch.Tensor  # (L, M) int32 on the CPU
    logprobs: torch.Tensor  # (L, M)
    vocabulary: int  # V

    def spread(self, device: Any) -> torch.Tensor:
        """Log-probabilities (L, V): what M tokens leave of the probability is the same for each of the others."""
        values, others = self.logprobs.to(device), max(1, self.vocabulary - self.ids.shape[1])
        rest = ((1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-12) / others).log()
        return rest.expand(-1, self.vocabulary).scatter(1, self.ids.to(device).long(), values)


def generate_answers(
    model: Any, prefix: list[int], cache: Any, data: PhaseDataset | TeacherRows, numbers: Sequence[int], limit: int,
    end: int, top_k: int, told: Callable[[int], None],
) -> dict[int, tuple[list[int], Likeliest]]:
    """Greedy answers to these rows behind the cached `prefix`, with `end`, and the likeliest tokens along them.

    Answers of more than `limit` tokens are left out. `told` gets the number of rows that are done.
    """
    answers, size = {}, rows_at_once(model, cache)
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        notes = _Notes(noted_tokens(top_k), len(some))
        prompts = [prompt for prompt, _ in data.take(some)]
        generated = generate(model, prefix, prompts, limit, end, cache, choose=notes.choose)
        for row, (n, ids) in enumerate(zip(some, generated, strict=True)):
            if len(ids) < limit:
                answers[n] = [*ids, end], notes.likeliest(row)
        told(start + len(some))
    return answers


def noted_tokens(top_k: int) -> int:
    """Likeliest tokens that are noted at each place of an answer."""
    return max(LEAST_NOTED, NOTED_TIMES * top_k)


class _Notes:
    """Chooses the likeliest token, as greedy generation does, and notes the `most` likeliest ones of each row."""

    def __init__(self, most: int, rows: int):
        self.most, self.vocabulary = most, 0
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(rows)]

    def choose(self, logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
        self.vocabulary = logits.shape[-1]
        found = torch.log_softmax(logits.float(), -1).topk(min(self.most, self.vocabulary))
        for row, ids, values in zip(rows, found.indices.int().cpu(), found.values.cpu(), strict=True):
            self.rows[row].append((ids, values))
        return found.indices[:, 0].tolist()

    def likeliest(self, row: int) -> Likeliest:
        ids, values = zip(*self.rows[row], strict=True)
        return Likeliest(torch.stack(ids), torch.stack(values), self.vocabulary)


def as_certain(labels: Answers, top_k: int) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA for labels that no teacher judges: each token of a label has all of the probability."""
    for number, label in labels.items():
        yield {
            "labelled": True, "number": number, "label_ids": label, "confidence": 0.0, "agreement": 1.0,
            "top_ids": [i for i in label for _ in range(top_k)],
            "top_logprobs": [-math.log(top_k)] * (top_k * len(label)),
        }


@torch.inference_mode()
def score_answers(
    model: Any, pack: Pack, prefixes: Sequence[list[int]], data: PhaseDataset | TeacherRows | AnchorRows,
    answers: Answers, top_k: int, size: int, noted: Mapping[int, Likeliest] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA by the mean of the views' distributions: the log-probability of an answer's least sure token, the
    share of views that give this answer, and the `top_k` likeliest tokens at each place.

    A view gives the answer if each token of it is the likeliest there, as greedy generation takes them: one forward
    pass over an answer, instead of generating it again. With `noted` the first view has generated the answers, and its
    distributions are those that it noted.
    """
    numbers = list(answers)
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        rows = [(prompt, answers[n]) for n, (prompt, _) in zip(some, data.take(some), strict=True)]
        mean = _ViewMean({n: answers[n] for n in some}, len(prefixes), model.device)
        for view, prefix in enumerate(prefixes):
            if view == 0 and noted is not None:
                mean.add(torch.cat([noted[n].spread(model.device) for n in some]))
            else:
                batch = to_device(pack(prefix, rows), model.device)
                mean.add(torch.log_softmax(answer_logits(model, batch).float(), -1))
        yield from mean.rows(data, top_k)


def score_noted(
    views: Sequence[Mapping[int, Likeliest]], data: PhaseDataset | TeacherRows | AnchorRows, answers: Answers,
    top_k: int,
) -> Iterator[dict[str, Any]]:
    """As `score_answers`, where another engine has noted each view's distributions along each answer."""
    for _, mean in _noted_means(views, answers):
        yield from mean.rows(data, top_k)


def score_views(views: Sequence[Mapping[int, Likeliest]], answers: Answers) -> dict[int, tuple[float, float]]:
    """Number -> (agreement, confidence) of each answer, as `score_answers` has them, by each view's noted tokens."""
    means = _noted_means(views, answers)
    return {number: (mean.agreement(slice(None)), mean.label_logprobs().min().item()) for number, mean in means}


def _noted_means(
    views: Sequence[Mapping[int, Likeliest]], answers: Answers
) -> Iterator[tuple[int, _ViewMean]]:
    """One answer's mean at a time, since it holds a distribution over the vocabulary for each token."""
    for number, label in answers.items():
        mean = _ViewMean({number: label}, len(views), "cpu")
        for view in views:
            mean.add(view[number].spread("cpu"))
        yield number, mean


class _ViewMean:
    """The mean of so many views' distributions along answers, one view after another since vocabularies are large."""

    def __init__(self, answers: Answers, views: int, device: Any):
        self.answers, self.views = answers, views
        self.labels = torch.tensor([i for label in answers.values() for i in label], device=device)
        self.gives: list[torch.Tensor] = []  # for each view (N,): whether it gives this token
        self.logprobs = torch.tensor(-math.inf, device=device)

    def add(self, seen: torch.Tensor) -> None:
        """One view's log-probabilities (N, V)."""
        self.gives.append(seen.argmax(-1) == self.labels)
        self.logprobs = torch.logaddexp(self.logprobs, seen - math.log(self.views))

    def label_logprobs(self) -> torch.Tensor:
        """The mean's log-probability (N,) of each token of the labels."""
        return self.logprobs.gather(1, self.labels[:, None])[:, 0]

    def agreement(self, part: slice) -> float:
        """The share of views that give each token of this part of the labels."""
        return sum(bool(view[part].all()) for view in self.gives) / len(self.gives)

    def rows(self, data: PhaseDataset | TeacherRows | AnchorRows, top_k: int) -> Iterator[dict[str, Any]]:
        """Rows of SCHEMA."""
        label_logprobs = self.label_logprobs()
        values, ids = self.logprobs.topk(top_k)
        at = 0
        for number, label in self.answers.items():
            part = slice(at, at := at + len(label))
            yield {
                "labelled": bool(data.label_lengths[number]), "number": number, "label_ids": label,
                "confidence": label_logprobs[part].min().item(),
                "agreement": self.agreement(part),
                "top_ids": ids[part].flatten().tolist(), "top_logprobs": values[part].flatten().tolist(),
            }
