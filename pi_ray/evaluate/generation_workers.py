"""Answers of columns to test rows, and their seconds: Ray Data actors that load the base model once, with every adapter beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.data.ray_map import stream
from pi_ray.evaluate.columns import Column
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder

Prompts = tuple[list[int], list[list[int]]]  # prefix ids, and the ids of each row
Seconds = list[tuple[float, ...]]  # of single requests: whole prompt, cached prefix, and where there is an adapter: merged
RECITED = 64  # tokens of an answer to a question for the hidden template
KINDS = ("latency_s", "latency_cached_s", "latency_merged_s")


def generated(
    config: RunConfig, columns: Sequence[Column], prompts: dict[str, Prompts], limit: int, typical: int, watch: Callable[[str, int, int], None], secret: str = "",
) -> tuple[dict[str, list[list[int]]], dict[str, Seconds], dict[str, dict[str, Any]]]:
    """column -> output ids in the order of rows; column -> seconds of the first rows, one by one; column -> what `probe` finds of the template `secret`."""
    size, few = config.evaluate.batch_size, config.evaluate.latency_rows
    work = [_item(c, prompts, range(i, min(i + size, len(prompts[c.name][1])))) for c in columns for i in range(0, len(prompts[c.name][1]), size)]
    work += [{**_item(c, prompts, [i]), "timed": True} for c in columns for i in range(min(few, len(prompts[c.name][1])))]
    work += [{**_item(c, prompts, []), "probe": secret} for c in columns if secret]
    outputs: dict[str, Any] = {c.name: [None] * len(prompts[c.name][1]) for c in columns}
    seconds: dict[str, Seconds] = {c.name: [] for c in columns}
    probes: dict[str, dict[str, Any]] = {c.name: {} for c in columns}
    for place, done in _answered(config, columns, work, limit, typical):
        item = work[place]
        column, of = item["column"], len(outputs[item["column"]])
        if "probe" in item:
            probes[column] = done
            continue
        if "timed" in item:
            seconds[column].append(tuple(done))
            watch(f"{column}, latency", len(seconds[column]), min(few, of))
            continue
        for i, ids in zip(item["rows"], done, strict=True):
            outputs[column][i] = ids
        watch(column, sum(o is not None for o in outputs[column]), of)
    return outputs, seconds, probes


def timed(config: RunConfig, columns: Sequence[Column], prompts: dict[str, Prompts], limit: int, typical: int, watch: Callable[[int], None]) -> dict[str, Seconds]:
    """column -> seconds of the first rows; for each row column after column, so that a slow minute of the machine meets them all."""
    rows = range(min(config.evaluate.latency_rows, *(len(own) for _, own in prompts.values())))
    work = [{**_item(c, prompts, [i]), "timed": True} for i in rows for c in columns]
    seconds: dict[str, Seconds] = {c.name: [] for c in columns}
    for n, (place, done) in enumerate(_answered(config, columns, work, limit, typical, one=True), start=1):
        seconds[work[place]["column"]].append(tuple(done))
        watch(n)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    return {kind: median(values) for kind, values in zip(KINDS, zip(*seconds, strict=True), strict=False)}


def _answered(config: RunConfig, columns: Iterable[Column], work: list[dict[str, Any]], limit: int, typical: int, one: bool = False) -> Iterator[tuple[int, Any]]:
    """(place in `work`, what Generator says). `one`: a single actor, which takes them in order."""
    session.connect()
    has = placement.nodes()
    gpus = int(sum(node.get("GPU", 0) for node in has))
    usual = {"num_gpus": 1} if gpus else {"num_cpus": max(1, int(max(node.get("CPU", 0) for node in has)) - 1)}
    share = {**({} if config.cluster.evaluate_resources else usual), **placement.options(config, "evaluate")}
    adapters = list(dict.fromkeys(c.adapter for c in columns if c.adapter))
    yield from stream(work, Generator, config.model, config.prompt, adapters, limit, typical, actors=1 if one else gpus or 1, mirror=storage_sync.of(config.root), **share)


def _item(column: Column, prompts: dict[str, Prompts], numbers: Iterable[int]) -> dict[str, Any]:
    prefix, own = prompts[column.name]
    return {"column": column.name, "adapter": column.adapter, "prefix": prefix, "rows": list(numbers), "prompts": [own[i] for i in numbers]}


class Generator:
    """Inside a Ray Data actor: the base model with every column's adapter beside it. Called with one item of work at a time."""

    def __init__(self, settings: ModelConfig, prompt: PromptConfig, adapters: list[str], limit: int, typical: int):
        import os

        import torch

        from pi_ray.evaluate.peft_adapters import LoadedAdapters
        from pi_ray.models import load_model
        from pi_ray.train import gist

        gpu = torch.cuda.is_available()
        if not gpu:
            torch.set_num_threads(os.cpu_count() or 1)  # Ray leaves an actor one; nothing else runs in this step
        self.encoder = PromptEncoder(load_tokenizer(settings), prompt)
        self.end = self.encoder.tokenizer.eos_token_id
        self.loaded = LoadedAdapters(load_model(settings, "cuda" if gpu else "cpu"))
        for folder in adapters:
            self.loaded.load(folder)
        self.gists = {folder: gist.read(Path(folder)) for folder in adapters}
        self.limit, self.typical = limit, typical
        self._prefix: tuple[str, Any] = ("", None)

    def __call__(self, work: dict[str, Any]) -> Any:
        """Output ids of each prompt; with "timed", of the first: seconds without and with a cached prefix, and with the adapter merged.

        With "probe" (a template): perplexity on other text, and how much of that template the column recites when asked.
        """
        from pi_ray.train.generation import greedy, latency, prefix_cache
        from pi_ray.train.gist import gist_cache

        self.loaded.activate(work["adapter"])
        model, prefix, gists = self.loaded.model, work["prefix"], self.gists.get(work["adapter"])
        fill = None if gists is None else partial(gist_cache, model, prefix, gists)
        if work.get("timed"):
            seconds = list(latency(model, prefix, work["prompts"][0], self.typical, fill))
            if work["adapter"]:
                with self.loaded.merged():
                    seconds.append(latency(model, prefix, work["prompts"][0], self.typical, fill)[0])
            return seconds
        if self._prefix[0] != work["column"]:
            self._prefix = (work["column"], fill() if fill else prefix_cache(model, prefix))
        if "probe" in work:
            return self._probe(model, prefix, work["probe"])
        return greedy(model, prefix, work["prompts"], self.limit, self.end, cache=self._prefix[1])

    def _probe(self, model: Any, prefix: list[int], secret: str) -> dict[str, Any]:
        from pi_ray.evaluate import forgetting
        from pi_ray.train.generation import greedy

        def answer(queries: list[str]) -> list[str]:
            rows = [self.encoder.row(query) for query in queries]
            return [self.encoder.decode(ids) for ids in greedy(model, prefix, rows, RECITED, self.end, cache=self._prefix[1])]

        found = forgetting.leak(answer, secret)
        return {"off_task_perplexity": forgetting.perplexity(model, self.encoder.tokenizer, forgetting.off_task()), "recited": found["recited"], "longest_run": found["longest_run"]}
