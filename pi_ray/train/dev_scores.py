"""Dev scores: a phase's answers to dev rows, generated and scored by the task's own metrics.

For a floor (`schedule.floor`) they are under the prompt that a server would send. A server finds no examples for a
request, so that a phase with shots is scored, and would be served, with that many training rows at the end of its
template, the same for every query. For `task.metric` they are under the prompts that are prepared for dev rows.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import torch
from sacrebleu.metrics.bleu import BLEU

from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder, template_with_examples
from pi_ray.protocols import Row, Task
from pi_ray.registry import tasks
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.tasks.dataset import score_rows
from pi_ray.train.batch_logits import answer_logits
from pi_ray.train.batches import Pack, PhaseDataset, TokenRow, dataset_manifest, packed_batch, to_device
from pi_ray.train.distributed import WorkerGroup
from pi_ray.train.floor import SENTENCE_BLEU, TOKEN_ACCURACY
from pi_ray.train.generation import compute_prefix_cache, generate_greedy
from pi_ray.train.phase_scores import scored_rows
from pi_ray.train.row_chains import chain_batches
from pi_ray.train.shared_prefix import ordinary_attention

BATCH_ROWS = 16  # rows answered at once


class ServedPrompt(NamedTuple):
    """The prompt that a server sends with each query after a phase: a template with `fixed_examples` at its end."""

    template: str
    rate: float
    fixed_examples: int


class DevScores(NamedTuple):
    """A phase's metrics of each dev row (name -> values in [0, 1], the deciding one first where task.metric has one),
    and the card's facts of the prompt they are under, where it is not the last phase's.
    """

    metrics: dict[str, list[float]]
    card: dict[str, Any]
    answers: tuple[str, ...] = ()  # kept where task.metric decides, for another one to choose again

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """The scores as the training log has them."""
        return {"scores": {name: round(fmean(values), 6) for name, values in self.metrics.items()}}

    @property
    def first(self) -> float:
        """The mean of the first metric."""
        return fmean(next(iter(self.metrics.values())))


class DevScorer:
    """Scores each phase of a run. All workers call `score_phase`, or `score_answers`, together."""

    def __init__(self, config: RunConfig):
        self.config, self.run = config, RunDir(config.root)
        self.phases = plan_phases(config.schedule)

    @cached_property
    def encoder(self) -> PromptEncoder:
        return PromptEncoder(load_tokenizer(self.config.model), self.config.prompt)

    def served_prompt(self, phase: int) -> ServedPrompt:
        """The phase's template, and as many training rows as it has shots, evenly spread over the file."""
        plan, bank = self.phases[phase], self.run.rows_of("train")
        rows = [bank[i * len(bank) // plan.shots] for i in range(plan.shots)]
        template = dataset_manifest(self.run.phase(phase))["template"]
        examples = [Example(r.query, r.answer) for r in rows]
        return ServedPrompt(template_with_examples(self.config.prompt, template, examples), plan.rate, plan.shots)

    @cached_property
    def task(self) -> Task:
        return tasks[self.config.task.name](self.config.task)

    @torch.no_grad()
    def score_answers(self, model: Any, pack: Pack, group: WorkerGroup, dev: PhaseDataset) -> DevScores:
        """The scores, on every worker, of answers to the prepared prompts of `dev`, by the metrics of task.metric.

        The answers themselves are on the first worker alone.
        """
        rows = self.run.read_rows("dev")
        numbers = scored_rows([*range(len(rows))])
        tokens = dev.take(numbers)
        limit = self.config.evaluate.max_new_tokens or math.ceil(1.25 * dev.tokens["label_max"])
        mine = range(group.rank, len(numbers), group.world)
        model.eval()
        prompts = [tokens[n][0] for n in mine]
        texts = self._answers(getattr(model, "module", model), pack, dev.prefix, prompts, limit)
        model.train()
        shares = group.gather_to_rank0(list(zip(mine, texts, strict=True)))
        answers = tuple(text for _, text in sorted(chain(*shares)))
        metrics = self._metrics([rows[n] for n in numbers], answers) if shares else {}
        return DevScores(group.broadcast_from_rank0(metrics), {}, answers)

    @torch.no_grad()
    def score_phase(self, model: Any, pack: Pack, group: WorkerGroup, phase: int) -> DevScores | None:
        """The scores on the first worker, None on the others and without a floor. Each worker answers a share of rows.

        Where ZeRO stage 3 shards the weights nothing can be generated, and the metric is token accuracy.
        """
        if not self.config.schedule.floor:
            return None
        prompt = self.served_prompt(phase)
        rows = scored_rows(self.run.read_rows("dev", prompt.rate))
        prefix = self.encoder.prefix(prompt.template)
        tokens = [(self.encoder.row(r.query, (), r.documents), self.encoder.answer(r.answer)) for r in rows]
        sharded = self.config.train.backend.shards_weights
        mine = range(group.rank, len(rows), group.world)
        model.eval()
        found: Sequence[Any]
        if sharded:
            most = -(-len(rows) // group.world)
            found = token_accuracies(model, group.device, pack, prefix, tokens, mine, most)
        else:
            limit = self.config.evaluate.max_new_tokens or math.ceil(1.25 * self._longest_answer(tokens))
            found = self._answers(getattr(model, "module", model), pack, prefix, [tokens[n][0] for n in mine], limit)
        model.train()
        shares = group.gather_to_rank0(list(zip(mine, found, strict=True)))
        if not shares:
            return None
        values = [value for _, value in sorted(chain(*shares))]
        sent = len(prefix) + fmean(len(ids) for ids, _ in tokens)
        facts = {**prompt._asdict(), "shots": 0, "query_prompt_tokens": round(sent)}
        answers = tuple(values) if self.config.training_metric else ()
        return DevScores({TOKEN_ACCURACY: values} if sharded else self._metrics(rows, values), facts, answers)

    def _longest_answer(self, tokens: Sequence[TokenRow]) -> int:
        in_training = dataset_manifest(self.run.phase(0))["tokens"]["label_max"]
        return max(in_training, *(len(label) for _, label in tokens))

    def _answers(
        self, model: Any, pack: Pack, prefix: list[int], prompts: Sequence[list[int]], limit: int
    ) -> list[str]:
        end, texts = self.encoder.tokenizer.eos_token_id, dict[int, str]()
        with ordinary_attention(model.get_base_model()) if pack is packed_batch else nullcontext():
            cache = compute_prefix_cache(model, prefix)
            for rows in chain_batches(prompts, BATCH_ROWS):
                answers = generate_greedy(model, prefix, [prompts[i] for i in rows], limit, end, cache=cache)
                texts |= zip(rows, map(self.encoder.decode, answers), strict=True)
        return [texts[i] for i in range(len(prompts))]

    def _metrics(self, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, list[float]]:
        """The task's metrics of each row, and without task.metric sentence BLEU from 0 to 1."""
        scores = score_rows(self.task, rows, texts)
        found = {name: [s[name] for s in scores] for name in scores[0]}
        if self.config.training_metric:
            return found
        bleu = BLEU(effective_order=True)
        similar = [bleu.sentence_score(text, [r.answer]).score / 100 for r, text in zip(rows, texts, strict=True)]
        return {**found, SENTENCE_BLEU: similar}


def token_accuracies(
    model: Any, device: str, pack: Pack, prefix: list[int], tokens: Sequence[TokenRow], mine: Sequence[int], most: int
) -> list[float]:
    """The share of each row's answer tokens that are the likeliest, for the rows `mine`, of which no worker has more
    than `most`: sharded models need all workers in each forward pass.
    """
    found: list[float] = []
    for start in range(0, most, BATCH_ROWS):
        some = mine[start : start + BATCH_ROWS]
        rows = [tokens[n] for n in some or [0]]
        batch = to_device(pack(prefix, rows), device)
        right = answer_logits(model, batch).argmax(-1) == batch.labels[batch.labels != -100]
        parts = right.float().split([len(label) for _, label in rows])
        found += [part.mean().item() for part in parts[: len(some)]]
    return found
