"""Generation for evaluation: Ray Data actors that load the base model once, with every column's adapter beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.data.ray_map import stream
from pi_ray.evaluate.answers import AnswerLengths
from pi_ray.evaluate.columns import Column
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.directory import RunDir
from pi_ray.train.gist import gist_ids

Prompts = tuple[list[int], list[list[int]]]  # prefix ids, and the ids of each row
PROBE_TOKENS = 64  # of an answer to a question for the hidden template


def column_prompts(column: Column, run: RunDir, encoder: PromptEncoder, split: str) -> Prompts:
    """The ids of the shared prefix, and those of each row, whose examples were chosen by its query alone."""
    bank = {r.id: r for r in run.read_rows("train")}
    shots, rows = run.read_shots(split, bank, column.shots), run.read_rows(split, column.rate)
    prefix = encoder.prefix(column.template) + gist_ids(column.gist)
    return prefix, [encoder.row(r.query, shots.get(r.id, ()), r.documents) for r in rows]


def work_item(column: Column, prompts: dict[str, Prompts], indices: Iterable[int], **kind: Any) -> dict[str, Any]:
    """One call of Generator: rows of one column; `kind` is timed=True, probe=template or nothing."""
    prefix, rows = prompts[column.name]
    chosen = list(indices)
    item = {"column": column.name, "adapter": column.adapter, "prefix": prefix, "rows": chosen}
    return {**item, "prompts": [rows[i] for i in chosen], **kind}


def run_work(
    config: RunConfig, columns: Sequence[Column], work: list[dict[str, Any]], lengths: AnswerLengths, actors: int = 0
) -> Iterator[tuple[int, Any]]:
    """Yield (place in `work`, result of Generator). One actor for each GPU unless `actors` says how many."""
    session.connect()
    nodes = placement.cluster_nodes()
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = max(1, int(max(node.get("CPU", 0) for node in nodes)) - 1)
    resources = {} if config.cluster.evaluate_resources else {"num_gpus": 1} if gpus else {"num_cpus": cpus}
    adapters = list(dict.fromkeys(c.adapter for c in columns if c.adapter))
    yield from stream(
        work, Generator, config.model, config.prompt, adapters, lengths,
        actors=actors or gpus or 1, sync=storage_sync.sync_for(config.root),
        **resources, **placement.worker_options(config, "evaluate"),
    )


class Generator:
    """A Ray Data actor: the base model with every column's adapter beside it. Called with one `work_item` at a time."""

    def __init__(self, settings: ModelConfig, prompt: PromptConfig, adapters: list[str], lengths: AnswerLengths):
        import os

        import torch

        from pi_ray.evaluate.peft_adapters import LoadedAdapters
        from pi_ray.models import load_model
        from pi_ray.train.gist import load_gist

        gpu = torch.cuda.is_available()
        if not gpu:
            torch.set_num_threads(os.cpu_count() or 1)  # Ray leaves an actor one; nothing else runs in this step
        self.encoder = PromptEncoder(load_tokenizer(settings), prompt)
        self.end = self.encoder.tokenizer.eos_token_id
        self.loaded = LoadedAdapters(load_model(settings, "cuda" if gpu else "cpu"))
        for folder in adapters:
            self.loaded.load(folder)
        self.gists = {folder: load_gist(Path(folder)) for folder in adapters}
        self.lengths = lengths
        self._prefix: tuple[str, Any] = ("", None)  # the column whose prefix is cached, and its KV cache

    def __call__(self, work: dict[str, Any]) -> Any:
        """The output ids of each prompt.

        With "timed", seconds of the first prompt: without and with a cached prefix, and with the adapter merged.
        With "probe" (a template), perplexity on other text, and how much of that template is recited when asked.
        """
        from pi_ray.train.generation import compute_prefix_cache, generate_greedy, request_seconds
        from pi_ray.train.gist import gist_cache

        self.loaded.activate(work["adapter"])
        model, prefix, gists = self.loaded.model, work["prefix"], self.gists.get(work["adapter"])
        fill = None if gists is None else partial(gist_cache, model, prefix, gists)
        if work.get("timed"):
            timed = (prefix, work["prompts"][0], self.lengths.typical, fill)
            seconds = list(request_seconds(model, *timed))
            if work["adapter"]:
                with self.loaded.merged():
                    seconds.append(request_seconds(model, *timed)[0])
            return seconds
        if self._prefix[0] != work["column"]:
            self._prefix = (work["column"], fill() if fill else compute_prefix_cache(model, prefix))
        if "probe" in work:
            return self._probe(model, prefix, work["probe"])
        return generate_greedy(model, prefix, work["prompts"], self.lengths.limit, self.end, cache=self._prefix[1])

    def _probe(self, model: Any, prefix: list[int], template: str) -> dict[str, Any]:
        from pi_ray.evaluate import forgetting
        from pi_ray.train.generation import generate_greedy

        def answer(queries: list[str]) -> list[str]:
            rows = [self.encoder.row(query) for query in queries]
            outputs = generate_greedy(model, prefix, rows, PROBE_TOKENS, self.end, cache=self._prefix[1])
            return [self.encoder.decode(ids) for ids in outputs]

        found = forgetting.probe_leak(answer, template)
        perplexity = forgetting.perplexity(model, self.encoder.tokenizer, forgetting.off_task_texts())
        return {"off_task_perplexity": perplexity, "recited": found["recited"], "longest_run": found["longest_run"]}
