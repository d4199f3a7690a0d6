"""Distillation: a teacher that reads the full prompt answers for students that will not see it.

The teacher is the adapter after the full-prompt phase, which has learned to read the prompt, or the base model. Once,
at the first phase transition, it answers the unlabelled queries greedily, and its likeliest tokens are stored at each
place of every answer, labelled or its own. It judges them under several views of the prompt, which differ in the order
of its lists: a line that is misread is misread otherwise in another order, so that an answer is kept where all views
agree. Later phases learn from both kinds, so that facts which only the template tells reach an adapter that sees the
query alone. The paper trains on labels only; this goes beyond it.
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

from pi_ray.config import DistillConfig, RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import staged, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.phases import first_taught_phase
from pi_ray.run.row_store import read_range
from pi_ray.train.batches import Pack, PhaseDataset, TokenRow, answer_logits, prepared_row_tokens, to_device
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.drills import find_run_facts, template_views, whole_template
from pi_ray.train.generation import compute_prefix_cache, generate_greedy
from pi_ray.train.held_out import MOST_TEXTS, choose_held_out
from pi_ray.train.shared_prefix import ordinary_attention
from pi_ray.units import UnitIndex, find_units

SCHEMA = pa.schema({
    "labelled": pa.bool_(), "number": pa.int32(), "label_ids": pa.list_(pa.int32()), "confidence": pa.float32(),
    "agreement": pa.float32(), "held_out": pa.bool_(),
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
    weights: torch.Tensor  # (N,) float32, how much each token counts

    def to(self, device: torch.device | str) -> Targets:
        return Targets(self.ids.to(device), self.probs.to(device), self.weights.to(device))


def write_teacher_answers(model: Any, config: RunConfig, fingerprint: str, group: WorkerGroup, pack: Pack) -> None:
    """Have the teacher answer unlabelled queries and judge the labels, each worker its share of the rows.

    The first worker writes all of it as one artifact by SCHEMA, in the order of rows, whose manifest counts answers.
    """
    run, distill, started = RunDir(config.root), config.train.distill, time.monotonic()
    labelled, unlabelled = PhaseDataset(run.phase(0)), PhaseDataset(run.phase(f"{UNLABELLED}-0"))
    size = config.train.micro_batch or config.rows_per_worker
    prefixes = view_prefixes(config)
    model.eval()
    with model.disable_adapter() if distill.teacher == "base" else nullcontext():
        mine = range(group.rank, len(unlabelled), group.world)
        limit, end = math.ceil(labelled.tokens["label_max"] * 1.25), load_tokenizer(config.model).eos_token_id
        with ordinary_attention(model.get_base_model()):
            generated = generate_answers(model, prefixes[0], unlabelled, mine, limit, end)
        mine = range(group.rank, len(labelled), group.world)
        labels = {n: label for n, (_, label) in zip(mine, labelled.take(mine), strict=True)}
        scored = chain(
            score_answers(model, pack, prefixes, labelled, labels, distill.top_k, size),
            score_answers(model, pack, prefixes, unlabelled, generated, distill.top_k, size),
        )
        batches = iter(lambda: list(islice(scored, BATCH_ROWS)), [])
        share = pa.Table.from_batches((pa.RecordBatch.from_pylist(rows, SCHEMA) for rows in batches), SCHEMA)
    model.train()
    if shares := group.gather_to_rank0(share):
        table = pa.concat_tables(shares).sort_by([("labelled", "descending"), ("number", "ascending")])
        table = _hold_out(table, config)
        own = table.filter(pc.invert(table["labelled"]))
        with staged(
            run.teacher_answers, fingerprint=fingerprint, top_k=distill.top_k, queries=len(unlabelled),
            answered=own.num_rows, kept=own.filter(_is_kept(own, distill)).num_rows,
            held_out=pc.sum(own["held_out"]).as_py() or 0, views=len(prefixes),
            seconds_teaching=round(time.monotonic() - started, 1),
        ) as tmp:
            pq.write_table(table, tmp / FILE, compression="zstd")
    group.barrier()


def _hold_out(table: pa.Table, config: RunConfig) -> pa.Table:
    """The rows with column `held_out`: queries whose answer all views give, chosen by the units of the template."""
    run, share = RunDir(config.root), config.train.distill.held_out
    held_out = np.zeros(table.num_rows, bool)
    sure = pc.and_(pc.invert(table["labelled"]), pc.equal(table["agreement"], 1.0)).to_numpy().nonzero()[0]
    sure = sure[:MOST_TEXTS]
    if share and len(sure):
        encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
        queries = read_range(run.rows_of(UNLABELLED).path, columns=["query"])["query"]
        answers = map(encoder.decode, table["label_ids"].take(sure).to_pylist())
        asked = queries.take(table["number"].to_numpy()[sure]).to_pylist()
        units = UnitIndex(find_units(whole_template(config)))
        texts = [f"{query}\n{answer}" for query, answer in zip(asked, answers, strict=True)]
        held_out[sure[choose_held_out(units, texts, share)]] = True
    place = table.column_names.index("held_out")
    return table.set_column(place, SCHEMA.field("held_out"), pa.array(held_out))


def generate_answers(
    model: Any, prefix: list[int], data: PhaseDataset, numbers: Sequence[int], limit: int, end: int
) -> Answers:
    """Greedy answers to these rows behind `prefix`, ending with `end`; those over `limit` tokens are left out."""
    cache, answers = compute_prefix_cache(model, prefix), {}
    for start in range(0, len(numbers), GENERATED_ROWS):
        some = numbers[start : start + GENERATED_ROWS]
        prompts = [prompt for prompt, _ in data.take(some)]
        generated = generate_greedy(model, prefix, prompts, limit, end, cache=cache)
        answers.update({n: [*ids, end] for n, ids in zip(some, generated, strict=True) if len(ids) < limit})
    return answers


def view_prefixes(config: RunConfig) -> list[list[int]]:
    """Token ids of the whole prompt in each order of its lists, the first one its own; one alone if it has no lists."""
    train = config.train
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    views = template_views(whole_template(config), find_run_facts(config), train.distill.views, train.seed)
    return [encoder.prefix(view) for view in views]


def longest_row_tokens(config: RunConfig) -> int:
    """Tokens of the longest row that trains, or that the teacher reads where no phase has the whole prompt."""
    longest = prepared_row_tokens(RunDir(config.root).phases)
    if not wants_unlabelled(config) or first_taught_phase(config):
        return longest
    return longest + max(map(len, view_prefixes(config)))


@torch.inference_mode()
def score_answers(
    model: Any, pack: Pack, prefixes: Sequence[list[int]], data: PhaseDataset, answers: Answers, top_k: int, size: int
) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA by the mean of the views' distributions: the log-probability of an answer's least sure token, the
    share of views that give this answer, and the `top_k` likeliest tokens at each place.

    A view gives the answer if each token of it is the likeliest there, as greedy generation takes them: one forward
    pass over an answer, instead of generating it again.
    """
    numbers = list(answers)
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        rows = [(prompt, answers[n]) for n, (prompt, _) in zip(some, data.take(some), strict=True)]
        batches = [to_device(pack(prefix, rows), model.device) for prefix in prefixes]
        labels = batches[0].labels[batches[0].labels != -100]
        gives, logprobs = [], torch.tensor(-math.inf, device=labels.device)
        for batch in batches:  # one view's (N, V) at a time, since vocabularies are large
            seen = torch.log_softmax(answer_logits(model, batch).float(), -1)
            gives.append(seen.argmax(-1) == labels)
            logprobs = torch.logaddexp(logprobs, seen - math.log(len(batches)))
        label_logprobs = logprobs.gather(1, labels[:, None])[:, 0]
        values, ids = logprobs.topk(top_k)
        at = 0
        for number, (_, label) in zip(some, rows, strict=True):
            part = slice(at, at := at + len(label))
            yield {
                "labelled": bool(data.label_lengths[number]), "number": number, "label_ids": label,
                "confidence": label_logprobs[part].min().item(),
                "agreement": sum(bool(view[part].all()) for view in gives) / len(gives),
                "top_ids": ids[part].flatten().tolist(), "top_logprobs": values[part].flatten().tolist(),
            }


def _is_kept(table: pa.Table, config: DistillConfig) -> pa.ChunkedArray:
    """Which rows of SCHEMA are learned from: those with labels, and answers that are sure enough and not held out."""
    sure = pc.greater_equal(table["confidence"], -math.inf if config.confidence is None else config.confidence)
    if config.agreement == "filter":
        sure = pc.and_(sure, pc.equal(table["agreement"], 1.0))
    return pc.or_(table["labelled"], pc.and_(sure, pc.invert(table["held_out"])))


class DistilledRows:
    """The rows of a phase after the first: those with labels, then unlabelled ones that the teacher answered surely."""

    def __init__(self, folder: Path, labelled: PhaseDataset, unlabelled: PhaseDataset, config: DistillConfig):
        self.top_k, self.prefix = verify_artifact(folder)["top_k"], labelled.prefix
        table = read_range(Path(folder) / FILE)
        kept = table.filter(_is_kept(table, config))
        # row number in this dataset -> (dataset with its prompt, row number there)
        self._prompts = [
            (labelled if has_label else unlabelled, number)
            for has_label, number in zip(kept["labelled"].to_pylist(), kept["number"].to_pylist(), strict=True)
        ]
        self._answers, self._ids, self._logprobs = kept["label_ids"], kept["top_ids"], kept["top_logprobs"]
        self._weights = np.ones(kept.num_rows, np.float32)
        if config.agreement == "weight":
            self._weights = np.where(kept["labelled"].to_numpy(), 1, kept["agreement"].to_numpy()).astype(np.float32)
        self.label_lengths = pc.list_value_length(self._answers).to_numpy()
        self.prompt_lengths = np.array([data.prompt_lengths[n] for data, n in self._prompts])

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, numbers: Sequence[int]) -> list[TokenRow]:
        prompts = [data.take([n])[0][0] for data, n in (self._prompts[i] for i in numbers)]
        return list(zip(prompts, self._answers.take(list(numbers)).to_pylist(), strict=True))

    def targets(self, numbers: list[int]) -> Targets:
        """The teacher's tokens at every answer token of these rows, in their order."""
        ids, logprobs = (
            np.concatenate([column[n].values.to_numpy() for n in numbers]).reshape(-1, self.top_k)
            for column in (self._ids, self._logprobs)
        )
        weights = np.repeat(self._weights[numbers], self.label_lengths[numbers])
        probs = torch.softmax(torch.from_numpy(logprobs), -1)
        return Targets(torch.from_numpy(ids.astype(np.int64)), probs, torch.from_numpy(weights))
