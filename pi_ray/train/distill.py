"""Distillation: a teacher that reads the full prompt answers for students that will not see it.

The teacher is the adapter after the full-prompt phase, which has learned to read the prompt, or the base model. Once,
at the first phase transition, it answers the unlabelled queries greedily, and its likeliest tokens are stored at each
place of every answer. Labels stand as they are, since it may misread what a label says; with a smaller `label_weight`
its tokens are stored along them too. It judges under several views of the prompt, which differ in the order of its
lists: a line that is misread is misread otherwise in another order, so that an answer is kept where all views agree.
The first view judges while it generates; each other one takes a forward pass over the answer.
Later phases learn from both kinds, so that facts which only the template tells reach an adapter that sees the query
alone. The paper trains on labels only; this goes beyond it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.phases import first_taught_phase
from pi_ray.run.row_store import read_range
from pi_ray.train.anchor import AnchorRows
from pi_ray.train.batch_logits import answer_logits
from pi_ray.train.batches import (
    Pack,
    PhaseDataset,
    dataset_manifest,
    prepared_row_tokens,
    to_device,
)
from pi_ray.train.distilled_rows import ANCHOR_FILE, FILE, SCHEMA, choose_kept
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.drills import find_run_facts, template_views, whole_template
from pi_ray.train.generation import compute_prefix_cache, generate, rows_at_once
from pi_ray.train.held_out import MOST_TEXTS, choose_held_out
from pi_ray.train.shared_prefix import ordinary_attention
from pi_ray.train.teacher_rows import TeacherRows, open_teacher_rows
from pi_ray.units import UnitIndex, find_units

TOLD_ROWS = 64  # judged rows after which it is said how far the teacher is
JUDGED_TIMES = 4  # rows judged at once, in batches of training: without gradients they need less memory
BATCH_ROWS = 1024  # rows that are Python objects at a time; as columns they take a tenth of the memory
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


def write_teacher_answers(
    model: Any, config: RunConfig, fingerprint: str, group: WorkerGroup, pack: Pack,
    tell: Callable[[str, int, int], None] = lambda verb, done, total: None,
) -> None:
    """Have the teacher answer unlabelled queries, and judge labels that do not weigh all; each worker has its share.

    The first worker writes all of it as one artifact by SCHEMA, in the order of rows, whose manifest counts answers.
    `tell` gets how far this worker is: "answered" or "judged", and of how many rows how many are.
    """
    run, distill, started = RunDir(config.root), config.train.distill, time.monotonic()
    labelled, unlabelled = open_teacher_rows(config, "train"), open_teacher_rows(config, UNLABELLED)
    size = config.train.micro_batch or JUDGED_TIMES * config.rows_per_worker
    prefixes = view_prefixes(config)
    model.eval()
    with model.disable_adapter() if distill.teacher == "base" else nullcontext():
        mine = range(group.rank, len(labelled), group.world)
        labels = {n: label for n, (_, label) in zip(mine, labelled.take(mine), strict=True)}
        rows = as_certain(labels, distill.top_k)
        if config.train.judges_labels:
            rows = score_answers(model, pack, prefixes, labelled, labels, distill.top_k, size)
            rows = _tell_judged(rows, 0, len(labels), len(labels), tell)
        mine = range(group.rank, len(unlabelled), group.world)
        all_rows = chain(rows, _answer_and_judge(model, config, pack, prefixes, unlabelled, mine, size, tell))
        batches = iter(lambda: list(islice(all_rows, BATCH_ROWS)), [])
        share = pa.Table.from_batches((pa.RecordBatch.from_pylist(rows, SCHEMA) for rows in batches), SCHEMA)
    anchor = _judge_anchor(model, config, pack, size) if distill.anchor and group.rank == 0 else None
    model.train()
    if shares := group.gather_to_rank0(share):
        table = pa.concat_tables(shares).sort_by([("labelled", "descending"), ("number", "ascending")])
        table = _hold_out(table, config)
        own = table.filter(pc.invert(table["labelled"]))
        with staged(
            run.teacher_answers, fingerprint=fingerprint, top_k=distill.top_k, queries=len(unlabelled),
            answered=own.num_rows, kept=own.filter(choose_kept(own, distill)).num_rows,
            held_out=pc.sum(own["held_out"]).as_py() or 0, views=len(prefixes),
            seconds_teaching=round(time.monotonic() - started, 1),
        ) as tmp:
            pq.write_table(table, tmp / FILE, compression="zstd")
            if anchor is not None:
                pq.write_table(anchor, tmp / ANCHOR_FILE, compression="zstd")
    group.barrier()


def _answer_and_judge(
    model: Any, config: RunConfig, pack: Pack, prefixes: Sequence[list[int]], data: PhaseDataset | TeacherRows,
    numbers: Sequence[int], size: int, tell: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA for these unlabelled queries, BATCH_ROWS of them at a time."""
    limit, end = longest_answer_tokens(config), load_tokenizer(config.model).eos_token_id
    top_k, total = config.train.distill.top_k, len(numbers)
    with ordinary_attention(model.get_base_model()):
        cache = compute_prefix_cache(model, prefixes[0])
    for start in range(0, total, BATCH_ROWS):
        some = numbers[start : start + BATCH_ROWS]
        told = partial(_tell_answered, tell, start, total)
        with ordinary_attention(model.get_base_model()):
            written = generate_answers(model, prefixes[0], cache, data, some, limit, end, top_k, told)
        answers = {n: label for n, (label, _) in written.items()}
        noted = {n: likeliest for n, (_, likeliest) in written.items()}
        scored = score_answers(model, pack, prefixes, data, answers, top_k, size, noted)
        yield from _tell_judged(scored, start, start + len(some), total, tell)


def _tell_answered(tell: Callable[[str, int, int], None], before: int, total: int, done: int) -> None:
    tell("answered", before + done, total)


def _tell_judged(
    scored: Iterator[dict[str, Any]], before: int, after: int, total: int, tell: Callable[[str, int, int], None]
) -> Iterator[dict[str, Any]]:
    """The rows as they come; of rows `before` to `after` some may have no answer."""
    for done, row in enumerate(scored, start=before + 1):
        yield row
        if done % TOLD_ROWS == 0 and done < after:
            tell("judged", done, total)
    if after > before:
        tell("judged", after, total)


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


def _judge_anchor(model: Any, config: RunConfig, pack: Pack, size: int) -> pa.Table:
    """The base model's likeliest tokens in the answers of the anchor rows, by SCHEMA."""
    rows = AnchorRows(config)
    labels = {n: label for n, (_, label) in enumerate(rows.take(range(len(rows))))}
    with model.disable_adapter():
        judged = list(score_answers(model, pack, [rows.prefix], rows, labels, config.train.distill.top_k, size))
    return pa.Table.from_pylist(judged, SCHEMA)


def longest_answer_tokens(config: RunConfig) -> int:
    """Most tokens of an answer that is generated: a quarter more than the longest label."""
    return math.ceil(dataset_manifest(RunDir(config.root).phase(0))["tokens"]["label_max"] * 1.25)


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
        notes = _Notes(max(LEAST_NOTED, NOTED_TIMES * top_k), len(some))
        prompts = [prompt for prompt, _ in data.take(some)]
        generated = generate(model, prefix, prompts, limit, end, cache, choose=notes.choose)
        for row, (n, ids) in enumerate(zip(some, generated, strict=True)):
            if len(ids) < limit:
                answers[n] = [*ids, end], notes.likeliest(row)
        told(start + len(some))
    return answers


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


def view_prefixes(config: RunConfig) -> list[list[int]]:
    """Token ids of the whole prompt in each order of its lists, the first one its own; one alone if it has no lists."""
    train = config.train
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    views = template_views(whole_template(config), find_run_facts(config), train.distill.views, train.seed)
    return [encoder.prefix(view) for view in views]


def longest_row_tokens(config: RunConfig) -> int:
    """Tokens of the longest row that trains, or that the teacher reads where no phase has the whole prompt."""
    run = RunDir(config.root)
    longest = prepared_row_tokens(run.phases)
    if wants_unlabelled(config) and config.train.distill.show_labels:
        tokens = dataset_manifest(run.phase(0))["tokens"]
        longest += tokens["row_max"] + tokens["label_max"]
    if not wants_unlabelled(config) or first_taught_phase(config):
        return longest
    return longest + max(map(len, view_prefixes(config)))


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
        labels = torch.tensor([i for _, label in rows for i in label], device=model.device)
        gives, logprobs = [], torch.tensor(-math.inf, device=labels.device)
        for view, prefix in enumerate(prefixes):  # one view's (N, V) at a time, since vocabularies are large
            if view == 0 and noted is not None:
                seen = torch.cat([noted[n].spread(labels.device) for n in some])
            else:
                batch = to_device(pack(prefix, rows), model.device)
                seen = torch.log_softmax(answer_logits(model, batch).float(), -1)
            gives.append(seen.argmax(-1) == labels)
            logprobs = torch.logaddexp(logprobs, seen - math.log(len(prefixes)))
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
