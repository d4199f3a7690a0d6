"""The base model as teacher: Ray Data actors, or vLLM, answer queries behind the whole prompt, in each of its orders.

An answer is what the model writes behind the prompt's own order; each other order (a view) says whether it would write
the same. The keys and values of each view's prompt are computed once for each actor.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from pi_ray.answer.teacher_answer import TeacherAnswer
from pi_ray.answer.vllm_base import answer_items
from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.data.ray_map import stream
from pi_ray.models import base_digest, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row
from pi_ray.run.artifact import digest
from pi_ray.run.directory import RunDir
from pi_ray.run.result_log import ResultLog
from pi_ray.train.drills import template_views
from pi_ray.train.generation import compute_prefix_cache, generate_greedy, label_logprobs
from pi_ray.train.replicas import generation_workers, load_for_generation
from pi_ray.train.vllm_batches import choose_engine

AT_ONCE = 16  # queries of one batch
NOTIFY_EVERY = 256  # answers after which they are sent to object storage
JUDGED_TOKENS = 1024  # answer tokens of a batch whose logits are held at once


def answer_by_base(
    config: RunConfig, rows: Sequence[Row], template: str, limit: int, watch: Callable[[int, int], None]
) -> tuple[list[TeacherAnswer], int]:
    """The answer to each row, of at most `limit` tokens, and the number of views.

    `watch` gets (answered, all). What is answered is kept in the run directory's answers.jsonl and not generated again,
    but where a smaller limit cut it off.
    """
    views = template_views(template, (), config.train.distill.views, config.train.seed)
    model, prompt = config.model.model_dump(mode="json"), config.prompt.model_dump(mode="json")
    settings = [model, base_digest(config.model), prompt, views, config.train.distill.max_tokens]
    keys = [digest([settings, row.query, row.documents]) for row in rows]
    log = ResultLog(RunDir(config.root).answer_log, notify_every=NOTIFY_EVERY)
    known = _read_answers(log, limit)
    todo = list({key: row for key, row in zip(keys, rows, strict=True) if key not in known}.items())
    watch(len(rows) - len(todo), len(rows))
    batches = [todo[i : i + AT_ONCE] for i in range(0, len(todo), AT_ONCE)]
    items = [{"rows": [[row.query, row.documents] for _, row in batch]} for batch in batches]
    with log:
        for place, answers in _run(config, items, views, limit):
            for (key, _), answer in zip(batches[place], answers, strict=True):
                known[key] = TeacherAnswer(**answer)
                log.add(key, {"limit": limit, **answer})
            watch(sum(key in known for key in keys), len(rows))
    return [known[key] for key in keys], len(views)


def _run(config: RunConfig, items: list[dict[str, Any]], views: list[str], limit: int) -> Iterator[tuple[int, Any]]:
    """(place of the item, its answers) as they are done."""
    if not items:
        return
    session.connect()
    nodes = placement.cluster_nodes()
    if choose_engine(config, []) == "vllm":
        yield from answer_items(config, items, views, limit, nodes)
        return
    actors, options = generation_workers(config, nodes)
    yield from stream(
        items, BaseTeacher, config.model, config.prompt, views, limit, actors=actors,
        sync=storage_sync.sync_for(config.root), **options,
    )


class BaseTeacher:
    """Inside an actor: the base model with the cached prompt of each view."""

    def __init__(self, settings: ModelConfig, prompt: PromptConfig, views: Sequence[str], limit: int):
        self.encoder, self.limit = PromptEncoder(load_tokenizer(settings), prompt), limit
        self.model = load_for_generation(settings)
        prefixes = [self.encoder.prefix(view) for view in views]
        self.views = [(prefix, compute_prefix_cache(self.model, prefix)) for prefix in prefixes]

    def __call__(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """A TeacherAnswer as a JSON value for each of `rows`, pairs of query and documents."""
        prompts = [self.encoder.row(query, (), documents) for query, documents in item["rows"]]
        (prefix, cache), *_ = self.views
        end = self.encoder.tokenizer.eos_token_id
        written = generate_greedy(self.model, prefix, prompts, self.limit, end, cache)
        texts = [self.encoder.decode(ids) for ids in written]
        answers = [TeacherAnswer(text, ended=len(ids) < self.limit) for text, ids in zip(texts, written, strict=True)]
        whole = [i for i, answer in enumerate(answers) if answer.ended and answer.text]
        size = max(1, JUDGED_TOKENS // max(len(ids) + 1 for ids in written))
        for start in range(0, len(whole), size):
            some = whole[start : start + size]
            self._judge(answers, some, [(prompts[i], [*written[i], end]) for i in some])
        return [asdict(answer) for answer in answers]

    def _judge(self, answers: list[TeacherAnswer], whole: list[int], rows: list[tuple[list[int], list[int]]]) -> None:
        """Put agreement and confidence into the answers numbered `whole`, whose ids are in `rows`."""
        seen = [label_logprobs(self.model, prefix, rows, cache) for prefix, cache in self.views]
        for place, i in enumerate(whole):
            logprobs = torch.stack([view[place][0] for view in seen])
            least = (logprobs.logsumexp(0) - math.log(len(seen))).min().item()
            agreement = sum(bool(view[place][1].all()) for view in seen) / len(seen)
            answers[i] = TeacherAnswer(answers[i].text, True, agreement, min(0.0, least))


def _read_answers(log: ResultLog, limit: int) -> dict[str, TeacherAnswer]:
    """Key -> answer, of those that no smaller limit cut off."""
    found = {}
    for key in log:
        with suppress(KeyError, TypeError, AttributeError):
            value = log[key]
            answer = TeacherAnswer(**{name: fact for name, fact in value.items() if name != "limit"})
            if answer.ended or value["limit"] >= limit:
                found[key] = answer
    return found
