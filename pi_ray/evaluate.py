"""Evaluate on the held-out test rows: the base model without and with the full prompt, plain fine-tuning, and PromptIntern.

Each is a column: an adapter (or none), a template and a number of shots. Generation runs on Ray Data actors that load the base once.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from pi_ray import cluster
from pi_ray.artifact import is_current, staged, verify
from pi_ray.config import ModelConfig, RunConfig
from pi_ray.fanout import stream
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row, Task
from pi_ray.registry import tasks
from pi_ray.results import LABELS
from pi_ray.rundir import RunDir, evaluate_fingerprint, plain_config
from pi_ray.schedule import plan_phases
from pi_ray.tasks.metrics import corpus_bleu, mean_interval
from pi_ray.train.lora import CARD, PACKAGES


@dataclass(frozen=True)
class Column:
    """One way to answer the test rows. `adapter` is a folder or "" for the base model."""

    name: str
    adapter: str
    template: str
    shots: int


def columns_of(config: RunConfig) -> list[Column]:
    """The columns of a trained run; "plain" only when its baseline was trained."""
    run = RunDir(config.root)
    card = json.loads((run.best / CARD).read_text())
    full = next(t["text"] for t in json.loads((run.templates / "templates.json").read_text()) if t["rate"] == 1.0)
    shots = config.evaluate.shots or max(p.shots for p in plan_phases(config.schedule))
    plain = run.baseline("plain").best
    return [
        Column("base", "", "", 0),
        Column("base_full_prompt", "", full, shots),
        *([Column("plain", str(plain.resolve()), "", 0)] if config.evaluate.baseline else []),
        Column("promptintern", str(run.best.resolve()), card["template"], card["shots"]),
    ]


def evaluate(config: RunConfig, watch: Callable[[str, int, int], None] = lambda column, done, total: None) -> dict[str, Any]:
    """Write eval/summary.json, samples.jsonl and outputs.jsonl, and return the summary. `watch` gets (column, rows done, rows in all).

    Skipped when the adapters and the evaluate block are those of the last time. Raises CorruptArtifactError for a damaged adapter.
    """
    run = RunDir(config.root)
    columns = columns_of(config)
    fingerprint = evaluate_fingerprint(config, [verify(Path(c.adapter))["fingerprint"] for c in columns if c.adapter])
    if is_current(run.evaluation, fingerprint):
        return json.loads((run.evaluation / "summary.json").read_text())
    task: Task = tasks[config.task.name](config.task)
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    rows, bank = run.read_rows("test"), {r.id: r for r in run.read_rows("train")}
    prompts = {c.name: _prompts(c, rows, run, bank, encoder) for c in columns}
    answers = [len(encoder.answer(r.answer)) for r in rows]
    longest = max(answers + [len(encoder.answer(r.answer)) for r in bank.values()])
    limit = config.evaluate.max_new_tokens or longest + -(-longest // 4)
    typical = round(sum(answers) / len(answers))
    outputs, seconds = _generate(config, columns, prompts, limit, typical, watch)
    summary = {
        "run": config.name, "task": config.task.name, "model": config.model.base, "seed": config.train.seed, "fingerprint": fingerprint,
        "command": "pi-ray " + " ".join(sys.argv[1:]), "train_rows": len(bank), "test_rows": len(rows), "max_new_tokens": limit, "latency_new_tokens": typical,
        "groups": _count(r.group for r in rows if r.group), "versions": _versions(), "hardware": _hardware(), "train": _train_facts(config),
    }
    texts = {c.name: [encoder.decode(ids) for ids in outputs[c.name]] for c in columns}
    for c in columns:
        prefix, own = prompts[c.name]
        summary[c.name] = {
            "label": LABELS[c.name],
            **_scores(task, rows, texts[c.name], config),
            "input_tokens": len(prefix) + sum(map(len, own)) / len(own),
            "output_tokens": sum(len(o) + 1 for o in outputs[c.name]) / len(own),
            "prefix_tokens": len(prefix),
            "latency_s": median(whole for whole, _ in seconds[c.name]),
            "latency_cached_s": median(cached for _, cached in seconds[c.name]),
            "groups": {g: {"rows": n, **_scores(task, *_of_group(g, rows, texts[c.name]), config)} for g, n in summary["groups"].items()},
        }
    with staged(run.evaluation, fingerprint=fingerprint) as tmp:
        (tmp / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        (tmp / "outputs.jsonl").write_text("".join(_lines(rows, texts)))
        (tmp / "samples.jsonl").write_text("".join(islice(_lines(rows, texts), config.evaluate.samples)))
    return summary


def _prompts(column: Column, rows: list[Row], run: RunDir, bank: dict[str, Row], encoder: PromptEncoder) -> tuple[list[int], list[list[int]]]:
    """Prefix ids, and each row's ids. Shots of test rows were chosen by the query, since the answer is not known at inference."""
    shots = run.read_shots("test", bank, column.shots)
    return encoder.prefix(column.template), [encoder.row(r.query, shots.get(r.id, ())) for r in rows]


def _generate(config: RunConfig, columns: list[Column], prompts: dict[str, Any], limit: int, typical: int, watch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """column -> output ids in the order of rows, and column -> [(seconds whole, seconds with cached prefix)]."""
    import ray

    size, timed = config.evaluate.batch_size, config.evaluate.latency_rows
    work: list[dict[str, Any]] = []
    for c in columns:
        prefix, own = prompts[c.name]
        work += [_item(c, prefix, own, range(start, min(start + size, len(own)))) for start in range(0, len(own), size)]
    for c in columns:  # timed last, row by row, when nothing else runs
        prefix, own = prompts[c.name]
        work += [{**_item(c, prefix, own, [i]), "timed": True} for i in range(min(timed, len(own)))]
    outputs: dict[str, Any] = {c.name: [None] * len(prompts[c.name][1]) for c in columns}
    seconds: dict[str, list[tuple[float, float]]] = {c.name: [] for c in columns}
    cluster.connect()
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    share = {"num_gpus": 1} if gpus else {"num_cpus": max(1, int(resources.get("CPU", 1)) - 1)}
    adapters = [c.adapter for c in columns if c.adapter]
    for place, done in stream(work, Generator, config.model, adapters, limit, typical, actors=gpus or 1, **share):
        item = work[place]
        column, of = item["column"], len(outputs[item["column"]])
        if "timed" in item:
            seconds[column].append(tuple(done))
            watch(f"{column}, latency", len(seconds[column]), min(timed, of))
            continue
        for i, ids in zip(item["rows"], done, strict=True):
            outputs[column][i] = ids
        watch(column, sum(o is not None for o in outputs[column]), of)
    return outputs, seconds


def _item(column: Column, prefix: list[int], own: list[list[int]], numbers: Any) -> dict[str, Any]:
    return {"column": column.name, "adapter": column.adapter, "prefix": prefix, "rows": list(numbers), "prompts": [own[i] for i in numbers]}


class Generator:
    """Inside a Ray Data actor: the base model with every column's adapter beside it. Called with one item of work at a time."""

    def __init__(self, settings: ModelConfig, adapters: list[str], limit: int, typical: int):
        import os

        import torch

        from pi_ray.models import load_model
        from pi_ray.serving.loras import LoadedAdapters

        gpu = torch.cuda.is_available()
        if not gpu:
            torch.set_num_threads(os.cpu_count() or 1)  # Ray leaves an actor one; nothing else runs in this step
        self.end = load_tokenizer(settings).eos_token_id
        self.loaded = LoadedAdapters(load_model(settings, "cuda" if gpu else "cpu"), limit=max(1, len(adapters)))
        for folder in adapters:
            self.loaded.load(folder, busy=adapters)
        self.limit, self.typical = limit, typical
        self._prefix: tuple[str, Any] = ("", None)

    def __call__(self, work: dict[str, Any]) -> list[Any]:
        """Output ids of each prompt, or with "timed" (seconds without, seconds with a cached prefix) of the first."""
        from pi_ray.generate import greedy, latency, prefix_cache

        self.loaded.activate(work["adapter"])
        model, prefix = self.loaded.model, work["prefix"]
        if work.get("timed"):
            return list(latency(model, prefix, work["prompts"][0], self.typical))
        if self._prefix[0] != work["column"]:
            self._prefix = (work["column"], prefix_cache(model, prefix))
        return greedy(model, prefix, work["prompts"], self.limit, self.end, cache=self._prefix[1])


def _scores(task: Task, rows: list[Row], texts: list[str], config: RunConfig) -> dict[str, Any]:
    """Every metric with its 95% bootstrap interval over rows; BLEU on 0..100, the others in 0..1."""
    each = [task.score(row, text) for row, text in zip(rows, texts, strict=True)]
    found = {name: mean_interval([s[name] for s in each], config.evaluate.bootstrap, config.train.seed) for name in each[0]}
    found["bleu"] = corpus_bleu(texts, [r.answer for r in rows], config.evaluate.bootstrap, config.train.seed)
    return {**{name: value for name, (value, _, _) in found.items()}, "intervals": {name: [low, high] for name, (_, low, high) in found.items()}}


def _of_group(group: str, rows: list[Row], texts: list[str]) -> tuple[list[Row], list[str]]:
    picked = [i for i, r in enumerate(rows) if r.group == group]
    return [rows[i] for i in picked], [texts[i] for i in picked]


def _lines(rows: list[Row], texts: dict[str, list[str]]) -> Iterator[str]:
    for i, r in enumerate(rows):
        yield json.dumps({"id": r.id, "group": r.group, "query": r.query, "answer": r.answer, "outputs": {name: own[i] for name, own in texts.items()}}, ensure_ascii=False) + "\n"


def _train_facts(config: RunConfig) -> dict[str, Any]:
    facts = {}
    for name, c in [("promptintern", config), *([("plain", plain_config(config))] if config.evaluate.baseline else [])]:
        steps = [e for e in map(json.loads, RunDir(c.root).train_log.read_text().splitlines()) if "loss" in e]
        facts[name] = {"updates": len(steps), "seconds": round(sum(e["seconds"] for e in steps), 1), "tokens": sum(e["tokens"] for e in steps), "workers": config.train.workers}
    return facts


def _count(values: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for v in values:
        counts[v] = counts.get(v, 0) + 1
    return counts


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from pi_ray import __version__

    return {"pi-ray": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}


def _hardware() -> str:
    import os

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return f"{os.cpu_count()} CPU cores ({name})"
