"""Latency: median seconds of single requests with and without a cached prefix, for columns on one engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from pi_ray.config import RunConfig
from pi_ray.evaluate import generation_workers
from pi_ray.evaluate.answers import answer_lengths
from pi_ray.evaluate.columns import Column
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.directory import RunDir

KINDS = ("latency_s", "latency_cached_s", "latency_merged_s")  # as one request is timed, the last with an adapter alone


def median_latencies(seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """The median of each of KINDS; `seconds` has those of one request after another."""
    return {kind: median(values) for kind, values in zip(KINDS, zip(*seconds, strict=True), strict=False)}


def compare_latencies(
    columns: Sequence[tuple[str, Column, RunConfig]], watch: Callable[[int], None]
) -> dict[str, dict[str, float]]:
    """Label -> median seconds of a request, for columns of several runs of one base model.

    One engine answers a row for column after column, so that a slow minute of the machine meets them all.
    """
    first = columns[0][2]
    split, encoder = first.evaluate.split, PromptEncoder(load_tokenizer(first.model), first.prompt)
    named = [replace(column, name=label) for label, column, _ in columns]
    prompts = {
        column.name: generation_workers.column_prompts(column, RunDir(config.root), encoder, split)
        for column, (_, _, config) in zip(named, columns, strict=True)
    }
    lengths = answer_lengths(first, RunDir(first.root).read_rows(split))
    rows = range(min(first.evaluate.latency_rows, *(len(ids) for _, ids in prompts.values())))
    work = [generation_workers.work_item(c, prompts, [i], timed=True) for i in rows for c in named]
    seconds: dict[str, list[Sequence[float]]] = {c.name: [] for c in named}
    for n, (place, timed) in enumerate(generation_workers.run_work(first, named, work, lengths, actors=1), start=1):
        seconds[work[place]["column"]].append(timed)
        watch(n)
    return {label: median_latencies(timed) for label, timed in seconds.items()}
