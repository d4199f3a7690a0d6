"""Distillation: a teacher that reads the full prompt answers for students that will not see it.

The teacher is the adapter after the full-prompt phase, which has learned to read the prompt, or the base model. Once,
before the first phase that learns from it, it answers the unlabelled queries greedily, and its likeliest tokens are
stored at each place of every answer. Labels stand as they are, since it may misread what a label says; with a smaller
`label_weight` its tokens are stored along them too. It judges under several views of the prompt, which differ in the
order of its lists: it misreads a line differently in another order, so that an answer is kept where all views agree.
The first view judges while it generates; each other one takes a forward pass over the answer. Later phases learn from
both kinds, so that facts which only the template tells reach an adapter that sees the query alone. The paper trains on
labels only; this goes beyond it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
from pi_ray.train.answer_scores import as_certain, generate_answers, score_answers
from pi_ray.train.batches import (
    Pack,
    PhaseDataset,
    dataset_manifest,
    prepared_row_tokens,
)
from pi_ray.train.cached_prefix import base_of
from pi_ray.train.distilled_rows import ANCHOR_FILE, FILE, SCHEMA, choose_kept
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.drills import find_run_facts, template_views, whole_template
from pi_ray.train.facts import WORD
from pi_ray.train.generation import compute_prefix_cache
from pi_ray.train.held_out import MOST_TEXTS, choose_held_out
from pi_ray.train.shared_prefix import ordinary_attention
from pi_ray.train.teacher_rows import TeacherRows, open_teacher_rows
from pi_ray.units import UnitIndex, find_units

TOLD_ROWS = 64  # judged rows after which it is said how far the teacher is
JUDGED_TIMES = 4  # rows judged at once, in batches of training: without gradients they need less memory
BATCH_ROWS = 1024  # rows that are Python objects at a time; as columns they take a tenth of the memory

def write_teacher_answers(
    model: Any, config: RunConfig, fingerprint: str, group: WorkerGroup, pack: Pack,
    tell: Callable[[str, int, int], None] = lambda verb, done, total: None,
) -> None:
    """Have the teacher answer unlabelled queries, and judge labels that do not weigh all; each worker has its share.

    The first worker writes all of it. `tell` gets how far this worker is: "answered" or "judged", and of how many rows
    how many are.
    """
    started, teacher = time.monotonic(), Teacher(model, config, pack)
    labelled, unlabelled = (range(group.rank, count, group.world) for count in teacher.counts)
    rows = chain(teacher.judge_labels(labelled, tell), teacher.answer(unlabelled, tell))
    batches = iter(lambda: list(islice(rows, BATCH_ROWS)), [])
    share = pa.Table.from_batches((pa.RecordBatch.from_pylist(some, SCHEMA) for some in batches), SCHEMA)
    anchor = teacher.judge_anchor() if config.train.distill.anchor and group.rank == 0 else None
    model.train()
    if shares := group.gather_to_rank0(share):
        write_answers(config, fingerprint, pa.concat_tables(shares), anchor, time.monotonic() - started)
    group.barrier()


def write_answers(
    config: RunConfig, fingerprint: str, table: pa.Table, anchor: pa.Table | None, seconds: float
) -> None:
    """Write rows of SCHEMA as one artifact, in the order of rows; its manifest counts answers."""
    distill, run = config.train.distill, RunDir(config.root)
    table = _mark_novel(table.sort_by([("labelled", "descending"), ("number", "ascending")]), config)
    table = _hold_out(table, config)
    own = table.filter(pc.invert(table["labelled"]))
    with staged(
        run.teacher_answers, fingerprint=fingerprint, top_k=distill.top_k,
        queries=len(open_teacher_rows(config, UNLABELLED)), answered=own.num_rows,
        kept=own.filter(choose_kept(own, distill)).num_rows, held_out=pc.sum(own["held_out"]).as_py() or 0,
        views=len(view_prefixes(config)), seconds_teaching=round(seconds, 1),
    ) as tmp:
        pq.write_table(table, tmp / FILE, compression="zstd")
        if anchor is not None:
            pq.write_table(anchor, tmp / ANCHOR_FILE, compression="zstd")


class Teacher:
    """A model that answers and judges, as rows of SCHEMA; where the base teaches, its adapter is left out."""

    def __init__(self, model: Any, config: RunConfig, pack: Pack):
        self.model, self.config, self.pack = model.eval(), config, pack
        self.prefixes = view_prefixes(config)
        self.labelled, self.unlabelled = open_teacher_rows(config, "train"), open_teacher_rows(config, UNLABELLED)
        self.size = config.train.micro_batch or JUDGED_TIMES * config.rows_per_worker

    @property
    def counts(self) -> tuple[int, int]:
        """Labelled rows, and unlabelled queries."""
        return len(self.labelled), len(self.unlabelled)

    def judge_labels(self, numbers: Sequence[int], tell: Callable[[str, int, int], None]) -> Iterator[dict[str, Any]]:
        """Rows for these labelled ones: judged, or certain where no teacher's judgement is learned."""
        labels = {n: label for n, (_, label) in zip(numbers, self.labelled.take(numbers), strict=True)}
        top_k = self.config.train.distill.top_k
        if not self.config.train.judges_labels:
            yield from as_certain(labels, top_k)
            return
        with self._teaching():
            judged = score_answers(
                self.model, self.pack, self.prefixes, self.labelled, labels, top_k, self.size
            )
            yield from _tell_judged(judged, 0, len(labels), len(labels), tell)

    def answer(self, numbers: Sequence[int], tell: Callable[[str, int, int], None]) -> Iterator[dict[str, Any]]:
        """Rows for the answers to these unlabelled queries."""
        with self._teaching():
            yield from _answer_and_judge(
                self.model, self.config, self.pack, self.prefixes, self.unlabelled, numbers, self.size, tell
            )

    def judge_anchor(self) -> pa.Table:
        """The base model's likeliest tokens in the answers of the anchor rows, by SCHEMA."""
        rows, top_k = AnchorRows(self.config), self.config.train.distill.top_k
        labels = {n: label for n, (_, label) in enumerate(rows.take(range(len(rows))))}
        with _without_adapter(self.model):
            judged = list(score_answers(self.model, self.pack, [rows.prefix], rows, labels, top_k, self.size))
        return pa.Table.from_pylist(judged, SCHEMA)

    def _teaching(self) -> AbstractContextManager[None]:
        return _without_adapter(self.model) if self.config.train.distill.teacher == "base" else nullcontext()


def _without_adapter(model: Any) -> AbstractContextManager[None]:
    """The context in which a model is its base alone, as one without an adapter is anyway."""
    return getattr(model, "disable_adapter", nullcontext)()


def _answer_and_judge(
    model: Any, config: RunConfig, pack: Pack, prefixes: Sequence[list[int]], data: PhaseDataset | TeacherRows,
    numbers: Sequence[int], size: int, tell: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """Rows of SCHEMA for these unlabelled queries, BATCH_ROWS of them at a time."""
    limit, end = longest_answer_tokens(config), load_tokenizer(config.model).eos_token_id
    top_k, total = config.train.distill.top_k, len(numbers)
    with ordinary_attention(base_of(model)):
        cache = compute_prefix_cache(model, prefixes[0])
    for start in range(0, total, BATCH_ROWS):
        some = numbers[start : start + BATCH_ROWS]
        told = partial(_tell_answered, tell, start, total)
        with ordinary_attention(base_of(model)):
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


def _mark_novel(table: pa.Table, config: RunConfig) -> pa.Table:
    """The rows with column `novel`: answers with a fact that no label has, and all where no facts are found."""
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    facts = find_run_facts(config)
    unused = {word for group in facts for word in group.words} - {word for group in facts for word in group.used}
    answers = map(encoder.decode, table["label_ids"].to_pylist())
    novel = [not facts or not unused.isdisjoint(WORD.findall(answer)) for answer in answers]
    return _set_flags(table, "novel", novel)


def _set_flags(table: pa.Table, name: str, values: Sequence[bool] | np.ndarray) -> pa.Table:
    return table.set_column(table.column_names.index(name), SCHEMA.field(name), pa.array(values, pa.bool_()))


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
    return _set_flags(table, "held_out", held_out)


def longest_answer_tokens(config: RunConfig) -> int:
    """Most tokens of an answer that is generated: a quarter more than the longest label."""
    return math.ceil(dataset_manifest(RunDir(config.root).phase(0))["tokens"]["label_max"] * 1.25)


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
