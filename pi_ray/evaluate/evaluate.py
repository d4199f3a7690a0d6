"""Evaluate on the held-out test rows: the base model without and with the full prompt, plain fine-tuning, and PromptIntern.

Each is a column: an adapter (or none), a template and a number of shots. answers.py has them generated and timed.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.evaluate.columns import LABELS, Column, columns_of, template_at
from pi_ray.evaluate.generation_workers import generated, medians, timed
from pi_ray.evaluate.statistics import corpus_bleu, mean_interval, paired_bleu, paired_mean
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row, Task
from pi_ray.registry import tasks
from pi_ray.run.artifact import is_current, read_manifest, staged, verify
from pi_ray.run.baseline import plain_config
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import evaluate_fingerprint
from pi_ray.train import gist
from pi_ray.train.lora import PACKAGES


def evaluate(
    config: RunConfig, watch: Callable[[str, int, int], None] = lambda column, done, total: None, columns: Sequence[Column] = (),
) -> dict[str, Any]:
    """Write eval/summary.json, samples.jsonl and outputs.jsonl, and return the summary. `watch` gets (column, rows done, rows in all).

    `columns` are those of `columns_of` unless given. Skipped when columns, adapters and the evaluate block are those of the last time.
    Raises CorruptArtifactError for a damaged adapter.
    """
    run = RunDir(config.root)
    columns = columns or columns_of(config)
    prepared = read_manifest(run.rows)["fingerprint"]
    trained_from = [(c.name, verify(Path(c.adapter))["fingerprint"] if c.adapter else prepared) for c in columns]
    fingerprint = evaluate_fingerprint(config, trained_from)
    if is_current(run.evaluation, fingerprint):
        return json.loads((run.evaluation / "summary.json").read_text())
    task: Task = tasks[config.task.name](config.task)
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    rows, bank = run.read_rows(config.evaluate.split), {r.id: r for r in run.read_rows("train")}
    prompts = {c.name: _prompts(c, run, bank, encoder, config.evaluate.split) for c in columns}
    limit, typical = _lengths(config, rows, list(bank.values()), encoder)
    outputs, seconds, probes = generated(config, columns, prompts, limit, typical, watch, template_at(run, 1.0) if config.evaluate.probe else "")
    summary = {
        "run": config.name, "task": config.task.name, "model": config.model.base, "seed": config.train.seed, "fingerprint": fingerprint,
        "command": "pi-ray " + " ".join(sys.argv[1:]), "train_rows": len(bank), "split": config.evaluate.split, "test_rows": len(rows), "max_new_tokens": limit, "latency_new_tokens": typical,
        "groups": _count(r.group for r in rows if r.group), "versions": _versions(), "hardware": _hardware(), "train": _train_facts(config, {c.name for c in columns}),
    }
    texts = {c.name: [encoder.decode(ids) for ids in outputs[c.name]] for c in columns}
    scores = {c.name: _score(task, rows, texts[c.name]) for c in columns}
    for c in columns:
        (prefix, own), each = prompts[c.name], scores[c.name]
        sent = c.gist or len(prefix)  # gist tokens are sent in place of the template, whose activations are not kept
        summary[c.name] = {
            "label": LABELS[c.name],
            **_summarise(rows, texts[c.name], each, config),
            "input_tokens": sent + sum(map(len, own)) / len(own),
            "output_tokens": sum(len(o) + 1 for o in outputs[c.name]) / len(own),
            "cut_off": sum(len(o) == limit for o in outputs[c.name]) / len(own),
            "prefix_tokens": sent,
            **medians(seconds[c.name]),
            **probes[c.name],
            "groups": {g: {"rows": n, **_summarise(*_of_group(g, rows, texts[c.name], each), config)} for g, n in summary["groups"].items()},
        }
    if "promptintern" in texts:
        others = [c.name for c in columns if c.name != "promptintern"]
        summary["paired"] = {other: _paired(rows, texts, scores, other, config) for other in others}
    with staged(run.evaluation, fingerprint=fingerprint) as tmp:
        (tmp / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        (tmp / "outputs.jsonl").write_text("".join(_lines(rows, texts, scores)))
        (tmp / "samples.jsonl").write_text("".join(islice(_lines(rows, texts, scores), config.evaluate.samples)))
    return summary


def speed(columns: Sequence[tuple[str, Column, RunConfig]], watch: Callable[[int], None]) -> dict[str, dict[str, float]]:
    """label -> median seconds of a request, for columns of several runs of one base model: one engine, column after column for each row."""
    first = columns[0][2]
    encoder = PromptEncoder(load_tokenizer(first.model), first.prompt)
    rows, prompts = RunDir(first.root).read_rows(first.evaluate.split), {}
    for label, column, config in columns:
        run = RunDir(config.root)
        prompts[label] = _prompts(column, run, {r.id: r for r in run.read_rows("train")}, encoder, first.evaluate.split)
    limit, typical = _lengths(first, rows, [], encoder)
    named = [replace(column, name=label) for label, column, _ in columns]
    seconds = timed(first, named, prompts, limit, typical, watch)
    return {label: medians(found) for label, found in seconds.items()}


def _lengths(config: RunConfig, rows: list[Row], bank: list[Row], encoder: PromptEncoder) -> tuple[int, int]:
    """(most new tokens of an answer, those of a typical one, with which requests are timed)."""
    own = [len(encoder.answer(r.answer)) for r in rows]
    longest = max(own + [len(encoder.answer(r.answer)) for r in bank])
    return config.evaluate.max_new_tokens or longest + -(-longest // 4), round(sum(own) / len(own))


def _prompts(column: Column, run: RunDir, bank: dict[str, Row], encoder: PromptEncoder, split: str) -> tuple[list[int], list[list[int]]]:
    """Prefix ids, and each row's ids. Their shots were chosen by the query, since the answer is not known at inference."""
    shots, rows = run.read_shots(split, bank, column.shots), run.read_rows(split, column.rate)
    return encoder.prefix(column.template) + gist.ids(column.gist), [encoder.row(r.query, shots.get(r.id, ()), r.documents) for r in rows]


def _score(task: Task, rows: list[Row], texts: list[str]) -> list[dict[str, float]]:
    """Per-row metrics; a task whose scoring is work (running programs) takes all rows at once."""
    at_once = getattr(task, "score_all", None)
    return at_once(rows, texts) if at_once else [task.score(row, text) for row, text in zip(rows, texts, strict=True)]


def _summarise(rows: list[Row], texts: list[str], each: list[dict[str, float]], config: RunConfig) -> dict[str, Any]:
    """Every metric with its 95% bootstrap interval over rows; BLEU on 0..100, the others in 0..1."""
    found = {name: mean_interval([s[name] for s in each], config.evaluate.bootstrap, config.train.seed) for name in each[0]}
    found["bleu"] = corpus_bleu(texts, [r.answer for r in rows], config.evaluate.bootstrap, config.train.seed)
    return {**{name: value for name, (value, _, _) in found.items()}, "intervals": {name: [low, high] for name, (_, low, high) in found.items()}}


def _paired(rows: list[Row], texts: dict[str, list[str]], scores: dict[str, list[dict[str, float]]], other: str, config: RunConfig) -> dict[str, list[float]]:
    """metric -> [difference, low, high, p] of PromptIntern against another column on the same rows."""
    mine, theirs, settings = scores["promptintern"], scores[other], (config.evaluate.bootstrap, config.train.seed)
    found = {name: paired_mean([s[name] for s in mine], [s[name] for s in theirs], *settings) for name in mine[0]}
    found["bleu"] = paired_bleu(texts["promptintern"], texts[other], [r.answer for r in rows], *settings)
    return {name: list(values) for name, values in found.items()}


def _of_group(group: str, rows: list[Row], *columns: list[Any]) -> list[list[Any]]:
    picked = [i for i, r in enumerate(rows) if r.group == group]
    return [[column[i] for i in picked] for column in (rows, *columns)]


def _lines(rows: list[Row], texts: dict[str, list[str]], scores: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    for i, r in enumerate(rows):
        own = {"outputs": {name: column[i] for name, column in texts.items()}, "scores": {name: column[i] for name, column in scores.items()}}
        yield json.dumps({"id": r.id, "group": r.group, "query": r.query, "answer": r.answer, **own}, ensure_ascii=False) + "\n"


def _train_facts(config: RunConfig, columns: set[str]) -> dict[str, Any]:
    facts = {}
    for name, c in [("promptintern", config), ("plain", plain_config(config))]:
        if name not in columns:
            continue
        log = [json.loads(line) for line in RunDir(c.root).train_log.read_text().splitlines()]
        steps, taught = [e for e in log if "loss" in e], next((e for e in log if e.get("event") == "taught"), {})
        seconds = sum(e["seconds"] for e in steps) + taught.get("seconds_teaching", 0)
        facts[name] = {"updates": len(steps), "seconds": round(seconds, 1), "tokens": sum(e["tokens"] for e in steps), "workers": config.train.workers}
        facts[name].update({key: taught[key] for key in ("queries", "answered", "kept") if key in taught})
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
