"""Evaluate on the held-out test rows through the service: tuned models with their prompt, and the base model without and with the full prompt."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import islice
from statistics import fmean, median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pi_ray import __version__
from pi_ray.errors import TrainingError
from pi_ray.evaluate.columns import LABELS
from pi_ray.hosted.answer import PARALLEL, replies
from pi_ray.hosted.client import OPENAI, Reply
from pi_ray.hosted.messages import prepared, prompts_of_columns
from pi_ray.hosted.price import confirmed
from pi_ray.hosted.tuning import is_tuned, tuned
from pi_ray.prompt import PromptEncoder, text_of
from pi_ray.run.artifact import digest, is_current, staged
from pi_ray.run.baseline import plain_config
from pi_ray.run.directory import RunDir

if TYPE_CHECKING:
    from pi_ray.config import RunConfig
    from pi_ray.evaluate.columns import Column
    from pi_ray.protocols import Row


def columns_of(config: RunConfig) -> list[Column]:
    """The columns of a tuned run, with model ids as adapters; "plain" only when its baseline was tuned."""
    from pi_ray.evaluate.columns import Column

    prompts, plain = prompts_of_columns(config), plain_config(config)
    with_plain = config.evaluate.baseline and RunDir(plain.root).rows.exists() and is_tuned(plain)
    return [
        Column("base", "", *prompts["base"]),
        Column("base_full_prompt", "", *prompts["base_full_prompt"]),
        *([Column("plain", tuned(plain)[-1]["model"], *prompts["plain"])] if with_plain else []),
        trained(config),
    ]


def trained(config: RunConfig) -> Column:
    """The run's tuned model, with the prompt of its last phase. Raises TrainingError when there is none yet."""
    from pi_ray.evaluate.columns import Column

    model = tuned(config)[-1].get("model")
    if not model:
        raise TrainingError(f"{config.root}: no model was tuned with these settings; run 'pi-ray train' (or 'pi-ray run') with this run.yaml first")
    return Column("promptintern", model, *prompts_of_columns(config)["promptintern"])


def evaluate(
    config: RunConfig,
    watch: Callable[[str, int, int], None] = lambda column, done, total: None,
    columns: Sequence[Column] = (),
    confirm: Callable[[str], bool] = lambda sentence: False,
    wait: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Write eval/summary.json, samples.jsonl and outputs.jsonl as pi_ray.evaluate.evaluate does, and return the summary.

    `columns` are those of `columns_of` unless given; `watch` gets (column, rows done, rows in all). Tokens are the service's count, seconds
    those of each request. Skipped when columns and the evaluate block are those of the last time; answers that are there are not asked again.
    The cost was confirmed with the training; `confirm` is called as by `tune` where all columns are the base model, which had none.
    """
    from pi_ray.evaluate.evaluate import _count, _lengths, _lines, _score
    from pi_ray.models import load_tokenizer
    from pi_ray.registry import tasks

    run, columns = RunDir(config.root), columns or columns_of(config)
    asked = [(c.name, c.adapter or config.closed.model, c.template, c.shots) for c in columns]
    fingerprint = digest([config.closed.base_url, asked, prepared(run), config.evaluate.model_dump(mode="json")])
    if is_current(run.evaluation, fingerprint):
        return json.loads((run.evaluation / "summary.json").read_text())
    if not any(c.adapter for c in columns):
        confirmed(config, (), [(c.template, c.shots, c.rate) for c in columns], lambda sentence: None, confirm)
    task, encoder = tasks[config.task.name](config.task), PromptEncoder(load_tokenizer(config.model), config.prompt)
    rows, bank = run.read_rows(config.evaluate.split), {r.id: r for r in run.read_rows("train")}
    limit, typical = _lengths(config, rows, list(bank.values()), encoder)
    summary = {
        "run": config.name, "task": config.task.name, "model": config.closed.model, "seed": config.train.seed, "fingerprint": fingerprint,
        "command": "pi-ray " + " ".join(sys.argv[1:]), "train_rows": len(bank), "split": config.evaluate.split, "test_rows": len(rows), "max_new_tokens": limit, "latency_new_tokens": typical,
        "groups": _count(r.group for r in rows if r.group), "versions": {"pi-ray": __version__, "python": platform.python_version(), "openai": version("openai")},
        "hardware": f"{urlsplit(config.closed.base_url or OPENAI).hostname}, asked {PARALLEL} at a time", "train": _train_facts(config, {c.name for c in columns}),
    }
    texts, scores = {}, {}
    for column, (name, model, template, shots) in zip(columns, asked, strict=True):
        near, given = run.read_shots(config.evaluate.split, bank, shots), run.read_rows(config.evaluate.split, column.rate)
        prompts = [text_of(config.prompt, r.query, template, near.get(r.id, ()), r.documents) for r in given]
        found = replies(config, model, prompts, limit, lambda done, total, name=name: watch(name, done, total), wait)
        texts[name] = [reply.text for reply in found]
        scores[name] = _score(task, rows, texts[name])
        own = [len(encoder.row(r.query, near.get(r.id, ()), r.documents)) for r in given]
        summary[name] = {
            "label": LABELS.get(name, name),
            **_scored(config, rows, texts[name], scores[name], summary["groups"]),
            **_measured(found, len(encoder.prefix(template)), own, [len(encoder.answer(text)) for text in texts[name]]),
        }
    with staged(run.evaluation, fingerprint=fingerprint) as tmp:
        (tmp / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        (tmp / "outputs.jsonl").write_text("".join(_lines(rows, texts, scores)))
        (tmp / "samples.jsonl").write_text("".join(islice(_lines(rows, texts, scores), config.evaluate.samples)))
    return summary


def _scored(config: RunConfig, rows: list[Row], texts: list[str], each: list[dict[str, float]], groups: dict[str, int]) -> dict[str, Any]:
    from pi_ray.evaluate.evaluate import _of_group, _summarise

    own = {g: {"rows": n, **_summarise(*_of_group(g, rows, texts, each), config)} for g, n in groups.items()}
    return {**_summarise(rows, texts, each, config), "groups": own}


def _measured(found: Sequence[Reply], prefix: int, own: Sequence[int], answers: Sequence[int]) -> dict[str, Any]:
    """Tokens and seconds of a request. `prefix`, `own` and `answers` are the tokenizer's counts of the shared part, each row's part and each
    answer: they say how much of the service's count is shared, and stand in where the service counts nothing.
    """
    asked = fmean(prefix + n if r.input_tokens is None else r.input_tokens for r, n in zip(found, own, strict=True))
    return {
        "input_tokens": asked,
        "output_tokens": fmean(n if r.output_tokens is None else r.output_tokens for r, n in zip(found, answers, strict=True)),
        "prefix_tokens": round(asked * prefix / (prefix + fmean(own))),
        "latency_s": median(r.seconds for r in found),
    }


def _train_facts(config: RunConfig, columns: set[str]) -> dict[str, Any]:
    """Of each tuned column, what its jobs took; "money" is what the service took for them."""
    facts = {}
    for name, c in (("promptintern", config), ("plain", plain_config(config))):
        if name in columns:
            total = {key: sum(phase.get(key, 0) for phase in tuned(c)) for key in ("updates", "seconds", "tokens")}
            facts[name] = {**total, "workers": 1, "money": total["tokens"] * config.closed.train_price / 1e6}
    return facts
