"""Distillation: a teacher that reads the full prompt answers for students that will not see it.

The teacher is the adapter as the full-prompt phase leaves it, which has learned to read the prompt, or the base model. Once, at the border
after the first phase, it answers the unlabelled queries (greedily; an answer is kept when even its least sure token is likely enough), and
its likeliest tokens are noted at each place of every answer, labelled or its own. The phases after learn from both. So facts that no labelled
row uses, but the template tells, reach the adapter that sees the query alone. The paper trains on labels only; this goes beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pi_ray.config import DistillConfig
from pi_ray.run.artifact import read_parquet, staged, verify
from pi_ray.train import shared_prefix
from pi_ray.train.batches import Batch, PhaseRows
from pi_ray.train.generation import greedy, prefix_cache

SCHEMA = pa.schema({
    "labelled": pa.bool_(), "number": pa.int32(), "label_ids": pa.list_(pa.int32()), "confidence": pa.float32(),
    "top_ids": pa.list_(pa.int32()), "top_logprobs": pa.list_(pa.float32()),
})  # top_*: top_k for each token of label_ids, one after another
FILE = "taught.parquet"
GENERATED = 16  # queries answered at once
JUDGED = 1024  # rows that are Python objects at a time: as columns they take a tenth of that memory
SAID = ("queries", "answered", "kept", "seconds_teaching")  # what its manifest says for the log

Row = tuple[list[int], list[int]]  # prompt ids, label ids
Answers = dict[int, list[int]]  # row number -> label ids


@dataclass(frozen=True)
class Targets:
    """What the teacher held likely at N answer tokens: `ids` (N, k) int64, `probs` (N, k) float32, which sum to 1 over k."""

    ids: torch.Tensor
    probs: torch.Tensor

    def to(self, device: torch.device | str) -> Targets:
        return Targets(self.ids.to(device), self.probs.to(device))


def answer(model: Any, data: PhaseRows, numbers: Sequence[int], limit: int, end: int) -> Answers:
    """The model's own answers to unlabelled rows under their prompt, ending with `end`; without those that do not end within `limit` tokens."""
    cache, found = prefix_cache(model, data.prefix), {}
    for start in range(0, len(numbers), GENERATED):
        some = numbers[start : start + GENERATED]
        prompts = [prompt for prompt, _ in data.take(some)]
        for number, ids in zip(some, greedy(model, data.prefix, prompts, limit, end, cache=cache), strict=True):
            if len(ids) < limit:
                found[number] = [*ids, end]
    return found


def lesson(
    model: Any, labelled: PhaseRows, unlabelled: PhaseRows, config: DistillConfig, end: int, view: Callable[[list[Row]], Batch], size: int, rank: int = 0, world: int = 1
) -> pa.Table:
    """One worker's share of what the teacher says, as SCHEMA has it: its answers to unlabelled queries, and what it holds likely in these and in the labels.

    `view` packs rows behind the full prompt, `size` of them for a forward pass; `end` is the token that ends an answer.
    """
    limit, base = math.ceil(labelled.tokens["label_max"] * 1.25), model.get_base_model()
    model.eval()
    with model.disable_adapter() if config.teacher == "base" else nullcontext():
        with shared_prefix.ordinary(base):
            answers = answer(model, unlabelled, range(rank, len(unlabelled), world), limit, end)
        own = labels(labelled, range(rank, len(labelled), world))
        said = chain(judge(model, view, labelled, own, config.top_k, size), judge(model, view, unlabelled, answers, config.top_k, size))
        share = pa.Table.from_batches(_columns(said), schema=SCHEMA)
    model.train()
    return share


def _columns(said: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(said, JUDGED)):
        yield pa.RecordBatch.from_pylist(some, schema=SCHEMA)


def labels(data: PhaseRows, numbers: Sequence[int]) -> Answers:
    return {n: label for n, (_, label) in zip(numbers, data.take(numbers), strict=True)}


@torch.inference_mode()
def judge(model: Any, view: Callable[[list[Row]], Batch], data: PhaseRows, answers: Answers, top_k: int, size: int) -> Iterator[dict[str, Any]]:
    """For each row: the log-probability of its answer's least sure token, and the `top_k` likeliest tokens at each place. `size` rows a forward pass."""
    numbers = list(answers)
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        rows = [(prompt, answers[n]) for n, (prompt, _) in zip(some, data.take(some), strict=True)]
        batch = view(rows)
        given = batch.labels != -100
        logprobs = torch.log_softmax(model(**batch.inputs).logits.flatten(0, -2).float()[given], -1)
        own = logprobs.gather(1, batch.labels[given][:, None])[:, 0]
        values, ids = logprobs.topk(top_k)
        at = 0
        for number, (_, label) in zip(some, rows, strict=True):
            part = slice(at, at := at + len(label))
            top = {"top_ids": ids[part].flatten().tolist(), "top_logprobs": values[part].flatten().tolist()}
            yield {"labelled": bool(data.label_lengths[number]), "number": number, "label_ids": label, "confidence": own[part].min().item(), **top}


def write(folder: Path, shares: Sequence[pa.Table], config: DistillConfig, fingerprint: str, queries: int, seconds: float) -> None:
    """The artefact, in the order of rows. `shares` are those of `lesson`, of so many unlabelled queries, made in so many seconds."""
    table = pa.concat_tables(shares).sort_by([("labelled", "descending"), ("number", "ascending")])
    own = table.filter(pc.invert(table["labelled"]))["confidence"].to_numpy()
    said = dict(zip(SAID, (queries, len(own), int((own >= config.confidence).sum()), seconds), strict=True))
    with staged(folder, fingerprint=fingerprint, top_k=config.top_k, **said) as tmp:
        pq.write_table(table, tmp / FILE, compression="zstd")


class Taught:
    """The rows of one phase after the teacher: those with labels first, then the unlabelled ones whose answers were sure enough."""

    def __init__(self, folder: Path, labelled: PhaseRows, unlabelled: PhaseRows, confidence: float):
        manifest = verify(folder)
        self.top_k = manifest["top_k"]
        table = read_parquet(Path(folder) / FILE)
        kept = table.filter(pc.or_(table["labelled"], pc.greater_equal(table["confidence"], confidence)))
        self._own = kept["labelled"].to_pylist()
        self._numbers = kept["number"].to_pylist()
        self._answers, self._ids, self._logprobs = kept["label_ids"], kept["top_ids"], kept["top_logprobs"]
        self._sources = {True: labelled, False: unlabelled}
        self.label_lengths = pc.list_value_length(self._answers).to_numpy()
        self.prompt_lengths = np.array([self._sources[own].prompt_lengths[n] for own, n in zip(self._own, self._numbers, strict=True)])
        self.prefix = labelled.prefix

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, places: Sequence[int]) -> list[Row]:
        prompts = [self._sources[self._own[p]].take([self._numbers[p]])[0][0] for p in places]
        return list(zip(prompts, self._answers.take(list(places)).to_pylist(), strict=True))

    def targets(self, places: Sequence[int]) -> Targets:
        """The teacher's tokens at every answer token of these rows, in their order."""
        ids = np.concatenate([self._ids[p].values.to_numpy() for p in places]).reshape(-1, self.top_k)
        logprobs = np.concatenate([self._logprobs[p].values.to_numpy() for p in places]).reshape(-1, self.top_k)
        return Targets(torch.from_numpy(ids.astype(np.int64)), torch.softmax(torch.from_numpy(logprobs.copy()), -1))
