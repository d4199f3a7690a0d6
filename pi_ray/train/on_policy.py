"""On-policy distillation: the student answers with its own prompt; the teacher, with the whole one, mends and judges.

A student that only reads answers of others never sees its own mistakes. So in the last updates it writes the answers
itself, a round of updates at a time. One forward pass of the teacher over each answer finds the first token at which
both differ much; there the teacher's token takes its place, and the student writes on behind it. An answer that needs
more than RESTARTS of these ends behind the last one. The student then learns the teacher's distribution at each token.
This is speculative knowledge distillation (Xu et al. 2025, arXiv 2410.11325), here by divergence instead of rank and
with the model's own first adapter as teacher.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.models import load_tokenizer
from pi_ray.protocols import UNLABELLED, GenerationRequest
from pi_ray.run.artifact import digest, is_current, staged
from pi_ray.run.directory import RunDir
from pi_ray.train.batch_logits import answer_logits
from pi_ray.train.batches import Pack, to_device
from pi_ray.train.distill import longest_answer_tokens, view_prefixes
from pi_ray.train.distilled_rows import ROUND_FILE, SCHEMA, DistilledRows, round_folder
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.generation import compute_prefix_cache, generate, rows_at_once
from pi_ray.train.lora import lent_weights, load_init_adapter
from pi_ray.train.sampling import Sampler, choose_sampled
from pi_ray.train.shared_prefix import ordinary_attention
from pi_ray.train.teacher_rows import open_teacher_rows
from pi_ray.train.updates import Round, Update, mixed_batch_rows

RESTARTS = 8  # times that the teacher mends an answer and the student writes on
ROUND_SCHEMA = SCHEMA.append(pa.field("replaced", pa.int32())).append(pa.field("divergence", pa.float32()))


class StudentWriter:
    """Writes the student's answers of one round at a time, each worker its share of the rows."""

    def __init__(self, config: RunConfig, fingerprint: str, group: WorkerGroup, pack: Pack):
        self.config, self.distill, self.fingerprint = config, config.train.distill, fingerprint
        self.group, self.pack, self.run = group, pack, RunDir(config.root)
        self.end = load_tokenizer(config.model).eos_token_id
        self.queries = open_teacher_rows(config, UNLABELLED)
        self.whole_prefix = view_prefixes(config)[0]
        self.limit = longest_answer_tokens(config)
        self.teacher_weights: dict[str, torch.Tensor] = {}

    def write_round(self, model: Any, asked: Round, updates: Sequence[Update], data: DistilledRows) -> None:
        """Have the student answer the unlabelled queries of these updates; the first worker writes the artifact."""
        started = time.monotonic()
        drawn = {n for u in updates for n in mixed_batch_rows(u, data.kinds, self.config.train)}
        numbers = sorted(n for n in drawn if data.kinds.is_answered(n))
        model.eval()
        rows = list(self._write(model, asked, data, numbers[self.group.rank :: self.group.world]))
        model.train()
        if shares := self.group.gather_to_rank0(pa.Table.from_pylist(rows, ROUND_SCHEMA)):
            table = pa.concat_tables(shares).sort_by("number")
            tokens = pc.sum(pc.list_value_length(table["label_ids"])).as_py() or 0
            with staged(
                round_folder(self.run, asked), fingerprint=self.fingerprint, step=asked.begin, answers=len(table),
                tokens=tokens, replaced=pc.sum(table["replaced"]).as_py() or 0,
                divergence=round((pc.sum(table["divergence"]).as_py() or 0.0) / max(1, tokens), 6),
                seconds_writing=round(time.monotonic() - started, 1),
            ) as tmp:
                pq.write_table(table, tmp / ROUND_FILE, compression="zstd")
        self.group.barrier()

    def _write(
        self, model: Any, asked: Round, data: DistilledRows, numbers: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Rows of ROUND_SCHEMA: answers as they are once the teacher changes nothing more in them."""
        fixed: dict[int, list[int]] = {n: [] for n in numbers}  # what is settled of answers that are not done
        replaced = dict.fromkeys(numbers, 0)
        for attempt in range(RESTARTS + 1):
            if not fixed:
                return
            answers = self._continue(model, data, fixed, f"{self.config.train.seed} {asked.number} {attempt}")
            for row in self._judge(model, data, answers):
                number, ids, wrong = row["number"], row["label_ids"], row.pop("wrong")
                place = next((i for i in range(len(fixed[number]), len(ids)) if wrong[i] is not None), None)
                if place is not None:
                    ids = [*ids[:place], wrong[place]]
                    replaced[number] += 1
                if place is None or ids[-1] == self.end or len(ids) >= self.limit or attempt == RESTARTS:
                    del fixed[number]
                    yield self._cut(row, ids, replaced[number])
                else:
                    fixed[number] = ids

    def _cut(self, row: dict[str, Any], ids: list[int], replaced: int) -> dict[str, Any]:
        """A judged row with these ids alone, of which the last one may be the teacher's."""
        top = len(ids) * self.distill.top_k
        divergence = math.fsum(row["divergence"][: len(ids)])
        return {
            **row, "label_ids": ids, "top_ids": row["top_ids"][:top], "top_logprobs": row["top_logprobs"][:top],
            "divergence": divergence, "replaced": replaced, "labelled": False, "held_out": False, "novel": True,
        }

    def _continue(
        self, model: Any, data: DistilledRows, fixed: dict[int, list[int]], key: str
    ) -> dict[int, list[int]]:
        """Row number -> its answer: what is settled, and what the student writes behind it."""
        answers, numbers, temperature = {}, list(fixed), self.distill.on_policy_temperature
        with ordinary_attention(model.get_base_model()):
            cache = compute_prefix_cache(model, data.prefix)
            size = rows_at_once(model, cache)
            for start in range(0, len(numbers), size):
                some = numbers[start : start + size]
                prompts = [prompt + fixed[n] for n, (prompt, _) in zip(some, data.take(some), strict=True)]
                seeds = [int(digest(f"{key} {n}")[:15], 16) for n in some]
                samplers = [Sampler(GenerationRequest([], 0, temperature=temperature, seed=seed)) for seed in seeds]
                most, choose = self.limit - min(len(fixed[n]) for n in some), choose_sampled(samplers, self.end)
                written = generate(model, data.prefix, prompts, most, self.end, cache, choose=choose)
                for n, ids in zip(some, written, strict=True):
                    ended = [*fixed[n], *ids, *([self.end] if len(ids) < most else [])]
                    answers[n] = ended[: self.limit]
        return answers

    @torch.inference_mode()
    def _judge(self, model: Any, data: DistilledRows, answers: dict[int, list[int]]) -> Iterator[dict[str, Any]]:
        """For each answer the teacher's likeliest tokens, how far the student is from it (bits), and at each place the
        token that belongs there instead, or None.
        """
        numbers, distill = list(answers), self.distill
        size = self.config.train.micro_batch or self.config.rows_per_worker
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            own = [(prompt, answers[n]) for n, (prompt, _) in zip(some, data.take(some), strict=True)]
            whole = self.queries.take([data.number_in_phase(n) for n in some])
            whole = [(prompt, answers[n]) for n, (prompt, _) in zip(some, whole, strict=True)]
            batch = to_device(self.pack(data.prefix, own), model.device)
            student = torch.log_softmax(answer_logits(model, batch).float(), -1)
            with self._teacher(model):
                batch = to_device(self.pack(self.whole_prefix, whole), model.device)
                teacher = torch.log_softmax(answer_logits(model, batch).float(), -1)
            divergence = jensen_shannon(student, teacher)
            likeliest = teacher.argmax(-1)
            wrong = (divergence > distill.on_policy_divergence) & (likeliest != batch.labels[batch.labels != -100])
            values, ids = teacher.topk(distill.top_k)
            at = 0
            for number in some:
                part = slice(at, at := at + len(answers[number]))
                pairs = zip(wrong[part].tolist(), likeliest[part].tolist(), strict=True)
                yield {
                    "number": number, "label_ids": answers[number], "divergence": divergence[part].tolist(),
                    "wrong": [token if is_wrong else None for is_wrong, token in pairs],
                    "top_ids": ids[part].flatten().tolist(), "top_logprobs": values[part].flatten().tolist(),
                }

    def _teacher(self, model: Any) -> AbstractContextManager[Any]:
        """A context in which the model is the teacher: the base, or the adapter that the first phase left."""
        if self.distill.teacher == "base":
            return model.disable_adapter()
        if not self.teacher_weights:
            folder = self.run.adapter(0)
            if not is_current(folder, self.fingerprint):
                raise TrainingError(
                    f"{folder}: the first phase's adapter, which is the teacher, is missing or of another run; delete "
                    f"{self.run.checkpoints} to train again"
                )
            self.teacher_weights = load_init_adapter(folder, model, self.config.model.base)
        return lent_weights(model, self.teacher_weights)


def jensen_shannon(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in bits, 0 to 1, of log-probabilities (N, V) -> (N,)."""
    mean = torch.logaddexp(ours, theirs) - math.log(2)
    nats = 0.5 * ((ours.exp() * (ours - mean)).sum(-1) + (theirs.exp() * (theirs - mean)).sum(-1))
    return (nats / math.log(2)).clamp(0, 1)
