"""Distillation: a teacher that reads the full prompt answers for students that will not see it.

The teacher is the adapter after the full-prompt phase, which has learned to read the prompt, or the base model. Once,
at the first phase transition, it answers the unlabelled queries greedily (an answer is kept when even its least sure
token is likely enough), and its likeliest tokens are stored at each place of every answer, labelled or its own. Later
phases learn from both, so that facts which only the template tells reach an adapter that sees the query alone. The
paper trains on labels only; this goes beyond it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
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

from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import staged, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import read_range
from pi_ray.train.batches import Pack, PhaseDataset, TokenRow, answer_logits, to_device
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.generation import compute_prefix_cache, generate_greedy
from pi_ray.train.shared_prefix import ordinary_attention

SCHEMA = pa.schema({
    "labelled": pa.bool_(), "number": pa.int32(), "label_ids": pa.list_(pa.int32()), "confidence": pa.float32(),
    "top_ids": pa.list_(pa.int32()), "top_logprobs": pa.list_(pa.float32()),
})  # top_*: top_k for each token of label_ids, one after another
FILE = "teacher_answers.parquet"
GENERATED_ROWS = 16  # queries answered at once
BATCH_ROWS = 1024  # rows that are Python objects at a time; as columns they take a tenth of the memory

Answers = dict[int, list[int]]  # row number -> label ids


@dataclass(frozen=True)
class Targets:
    """The teacher's likeliest tokens at N answer tokens: `ids` (N, k) int64, `probs` (N, k) float32, sum 1 over k."""

    ids: torch.Tensor
    probs: torch.Tensor

    def to(self, device: torch.device | str) -> Targets:
        return Targets(self.ids.to(device), self.probs.to(device))


def write_teacher_answers(model: Any, config: RunConfig, fingerprint: str, group: WorkerGroup, pack: Pack) -> None:
    """Have the teacher answer unlabelled queries and judge the labels, each worker its share of the rows.

    The first worker writes all of it as one artifact by SCHEMA, in the order of rows, whose manifest counts answers.
    """
    run, distill, started = RunDir(config.root), config.train.distill, time.monotonic()
    labelled, unlabelled = PhaseDataset(run.phase(0)), PhaseDataset(run.phase(f"{UNLABELLED}-0"))
    size = config.train.micro_batch or config.rows_per_worker
    model.eval()
    with model.disable_adapter() if distill.teacher == "base" else nullcontext():
        mine = range(group.rank, len(unlabelled), group.world)
        limit, end = math.ceil(labelled.tokens["label_max"] * 1.25), load_tokenizer(config.model).eos_token_id
        with ordinary_attention(model.get_base_model()):
            generated = generate_answers(model, unlabelled, mine, limit, end)
        mine = range(group.rank, len(labelled), group.world)
        labels = {n: label for n, (_, label) in zip(mine, labelled.take(mine), strict=True)}
        scored = chain(
            score_answers(model, pack, labelled, labels, distill.top_k, size),
            score_answers(model, pack, unlabelled, generated, distill.top_k, size),
        )
        batches = iter(lambda: list(islice(scored, BATCH_ROWS)), [])
        share = pa.Table.from_batches((pa.RecordBatch.from_pylist(rows, SCHEMA) for rows in batches), SCHEMA)
    model.train()
    if shares := group.gather_to_rank0(share):
        table = pa.concat_tables(shares).sort_by([("labelled", "descending"), ("number", "ascending")])
        confidence = table.filter(pc.invert(table["labelled"]))["confidence"].to_numpy()
        with staged(
            run.teacher_answers, fingerprint=fingerprint, top_k=distill.top_k, queries=len(unlabelled),
            answered=len(confidence), kept=int((confidence >= distill.confidence).sum()),
            seconds_teaching=round(time.monotonic() - started, 1),
        ) as tmp:
            pq.write_table(table, tmp / FILE, compression="zstd")
    group.barrier()


def generate_answers(model: Any, data: PhaseDataset, numbers: Sequence[int], limit: int, end: int) -> Answers:
    """Greedy answers to these rows behind their prefix, ending with `end`; those over `limit` tokens are left out."""
    cache, answers = compute_prefix_cache(model, data.prefix), {}
    for start in range(0, len(numbers), GENERATED_ROWS):
        some = numbers[start : start + GENERATED_ROWS]
        prompts = [prompt for prompt, _ in data.take(some)]
        generated = generate_greedy(model, data.prefix, prompts, limit, end, cache=cache)
        answers.update({n: [*ids, end] for n, ids in zip(some, generated, strict=True) if len(ids) < limit})
    return answers


@torch.inference_mode()
def score_answers(
    model: Any, pack: Pack, data: PhaseDataset, answers: Answers, top_k: int, size: int
) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA: an answer's least sure log-probability, and the `top_k` likeliest tokens at each place."""
    numbers = list(answers)
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        rows = [(prompt, answers[n]) for n, (prompt, _) in zip(some, data.take(some), strict=True)]
        batch = to_device(pack(data.prefix, rows), model.device)
        logprobs = torch.log_softmax(answer_logits(model, batch).float(), -1)
        label_logprobs = logprobs.gather(1, batch.labels[batch.labels != -100][:, None])[:, 0]
        values, ids = logprobs.topk(top_k)
        at = 0
        for number, (_, label) in zip(some, rows, strict=True):
            part = slice(at, at := at + len(label))
            yield {
                "labelled": bool(data.label_lengths[number]), "number": number, "label_ids": label,
                "confidence": label_logprobs[part].min().item(),
                "top_ids": ids[part].flatten().tolist(), "top_logprobs": values[part].flatten().tolist(),
            }


class DistilledRows:
    """The rows of a phase after the first: those with labels, then unlabelled ones that the teacher answered surely."""

    def __init__(self, folder: Path, labelled: PhaseDataset, unlabelled: PhaseDataset, confidence: float):
        self.top_k, self.prefix = verify_artifact(folder)["top_k"], labelled.prefix
        table = read_range(Path(folder) / FILE)
        kept = table.filter(pc.or_(table["labelled"], pc.greater_equal(table["confidence"], confidence)))
        # row number in this dataset -> (dataset with its prompt, row number there)
        self._prompts = [
            (labelled if has_label else unlabelled, number)
            for has_label, number in zip(kept["labelled"].to_pylist(), kept["number"].to_pylist(), strict=True)
        ]
        self._answers, self._ids, self._logprobs = kept["label_ids"], kept["top_ids"], kept["top_logprobs"]
        self.label_lengths = pc.list_value_length(self._answers).to_numpy()
        self.prompt_lengths = np.array([data.prompt_lengths[n] for data, n in self._prompts])

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, numbers: Sequence[int]) -> list[TokenRow]:
        prompts = [data.take([n])[0][0] for data, n in (self._prompts[i] for i in numbers)]
        return list(zip(prompts, self._answers.take(list(numbers)).to_pylist(), strict=True))

    def targets(self, numbers: Sequence[int]) -> Targets:
        """The teacher's tokens at every answer token of these rows, in their order."""
        ids, logprobs = (
            np.concatenate([column[n].values.to_numpy() for n in numbers]).reshape(-1, self.top_k)
            for column in (self._ids, self._logprobs)
        )
        return Targets(torch.from_numpy(ids.astype(np.int64)), torch.softmax(torch.from_numpy(logprobs), -1))
