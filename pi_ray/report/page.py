"""report.html: one self-contained page that a manager understands and an engineer can check. No network, no scripts.

Everything from outside (rows, model output, config) is escaped: by jinja2's autoescape in report.html, by plots.py inside pictures. A
content-security policy forbids scripts and loads even so, because the samples are whatever a model wrote.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pi_ray import __version__, progress
from pi_ray.config import RunConfig, dump
from pi_ray.errors import CorruptArtifactError, DataError
from pi_ray.evaluate import columns
from pi_ray.report import charts, cost
from pi_ray.report import summary as numbers
from pi_ray.report.summary import table
from pi_ray.run.artifact import read_manifest, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train.train_log import entries

__all__ = ["table", "write_report"]

LONGEST_TEXT = 4000  # characters of one sample's text that are shown


def write_report(run: RunDir, config: RunConfig) -> Path:
    """Write the run's report from eval/, train.jsonl, phases/ and templates/; what is missing there is left out.

    Raises DataError when the run was not evaluated, CorruptArtifactError when its summary cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["svg"] = Markup
    return write_atomic(run.report, _clean(page.get_template("page.html").render(_context(run, config, _summary(run)))))


def _summary(run: RunDir) -> dict[str, Any]:
    path = run.evaluation / "summary.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: not there; run 'pi-ray evaluate' before the report") from None
    except ValueError as error:
        raise CorruptArtifactError(f"{path}: not readable as JSON ({error}); run 'pi-ray evaluate' again") from error


def _context(run: RunDir, config: RunConfig, summary: dict[str, Any]) -> dict[str, Any]:
    metric, phases = numbers.main_metric(summary), plan_phases(config.schedule)
    updates, plain = _updates(run.train_log), _updates(run.baseline("plain").train_log)
    templates = _templates(run)
    spans = _spans(run, config, updates, templates)
    found = numbers.columns(summary)
    return {
        "version": __version__,
        "colours": charts.COLOURS,
        "summary": summary,
        "names": [(name, numbers.label(name, column)) for name, column in found.items()],
        "headline": numbers.headline(summary, phases[-1]),
        "verdict": cost.verdict(summary, config.cost),
        "findings": list(numbers.findings(summary)),
        "caveats": list(numbers.caveats(summary)),
        "tiles": _tiles(summary, config, metric),
        "lines": numbers.lines(summary),
        "metric": numbers.metric_name(metric),
        "group_lines": numbers.group_lines(summary, metric),
        "cost": _cost(summary, config),
        "phases": _phase_lines(run, spans),
        "neighbours": _neighbours(run, config),
        "tokens_svg": charts.tokens(summary),
        "quality_svg": charts.quality(summary, metric),
        "training_svg": charts.training(updates, plain, spans) if updates else "",
        "samples": list(_samples(run, found, config.evaluate.samples)),
        "templates": templates,
        "config": dump(config),
        "command": summary.get("command") or f"pi-ray run {shlex.quote(str(run.config))}",
    }


def _tiles(summary: dict[str, Any], config: RunConfig, metric: str) -> list[tuple[str, str, str]]:
    """(number, what it is, against what): the four numbers at the top."""
    mine, full = summary["promptintern"], summary["base_full_prompt"]
    money, fewer = cost.of_summary(summary, config.cost), numbers.reduction(summary, mine)
    paid = f"{money.requests_cached:,}" if money.requests_cached is not None else "never"
    took, took_cached = numbers.seconds(full.get("latency_s")), numbers.seconds(full.get("latency_cached_s"))
    plain = summary.get("plain")
    against = f"{numbers.value(metric, full[metric])} base with full prompt" + (f", {numbers.value(metric, plain[metric])} plain fine-tuning" if plain else "")
    return [
        (numbers.percent(fewer), "fewer input tokens per request", f"{mine['input_tokens']:,.0f} instead of {full['input_tokens']:,.0f}"),
        (numbers.value(metric, mine[metric]), numbers.in_sentence(metric), against),
        (numbers.seconds(mine.get("latency_s")), "per request", f"full prompt {took}, cached {took_cached}"),
        (paid, "requests until training is paid back", "against the full prompt with a cached prefix"),
    ]


def _cost(summary: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Cells of the cost section, as text."""
    money, prices = cost.of_summary(summary, config.cost), config.cost
    write = lambda amount: progress.format_money(amount, prices.currency)  # noqa: E731
    requests = lambda n: f"{n:,} requests" if n is not None else "never"  # noqa: E731
    return {
        "lines": [
            (write(1000 * p.uncached), write(1000 * p.cached), write(cost.monthly(prices, p.uncached)), write(cost.monthly(prices, p.cached)))
            for p in money.prices.values()
        ],
        "requests_per_month": f"{prices.requests_per_month:,}",
        "training": [
            (columns.LABELS.get(name, name), _trained(facts), write(cost.trained_cost(prices, facts)))
            for name, facts in summary["train"].items()
        ],
        "saving": (write(cost.monthly(prices, money.saving.uncached)), write(cost.monthly(prices, money.saving.cached))),
        "break_even": (requests(money.requests_uncached), requests(money.requests_cached)),
        "prices": f"{prices.currency} per million tokens: input {prices.input:g}, cached input {prices.cached_input:g}, output {prices.output:g}; "
        f"one worker for an hour {prices.training_hour:g}",
    }


def _trained(facts: dict[str, Any]) -> str:
    hours = facts["seconds"] / 3600
    time = f"{hours:.1f} h" if hours >= 1.5 else f"{facts['seconds'] / 60:.1f} min"
    return f"{facts['updates']:,} updates, {facts['tokens']:,} tokens, {time} on {facts['workers']} worker{'s' * (facts['workers'] != 1)}"


def _log(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of train.jsonl that can be read: a killed run may have left half of one."""
    return entries(path.read_bytes()) if path.is_file() else iter(())


def _updates(path: Path) -> list[dict[str, Any]]:
    """One entry for each update; of one that was done again after a restart, the last. Losses that are no number are left out."""
    by_step = {e["step"]: e for e in _log(path) if "loss" in e and isinstance(e["loss"], int | float) and math.isfinite(e["loss"])}
    return [by_step[step] for step in sorted(by_step)]


def _spans(run: RunDir, config: RunConfig, updates: Sequence[dict[str, Any]], templates: Sequence[dict[str, Any]]) -> list[charts.Span]:
    """The phases on the axis of updates. A phase with no update in the log is left out."""
    ends = {e["phase"]: e.get("dev_loss") for e in _log(run.train_log) if e.get("event") == "phase_end"}
    best = {e["phase"] for e in _log(run.train_log) if e.get("event") == "best"}
    achieved = {t["rate"]: t["achieved"] for t in templates}
    spans, start = [], min((u["step"] for u in updates), default=0)
    for i, phase in enumerate(plan_phases(config.schedule)):
        steps = [u["step"] for u in updates if u["phase"] == i]
        if steps:
            spans.append(charts.Span(i, phase, achieved.get(phase.rate, phase.rate), start, max(steps), ends.get(i), i in best))
            start = max(steps)
    return spans


def _templates(run: RunDir) -> list[dict[str, Any]]:
    path = run.templates / "templates.json"
    return json.loads(path.read_bytes()) if path.is_file() else []


def _phase_lines(run: RunDir, spans: Sequence[charts.Span]) -> list[list[str]]:
    """Cells of the table of phases."""
    table = []
    for span in spans:
        manifest = read_manifest(run.phase(span.index)) or {}
        counts = manifest.get("tokens", {})
        tokens = [f"{counts[k]:,.0f}" if k in counts else "–" for k in ("prefix", "row_mean", "label_mean")]
        rows = f"{manifest['rows']:,}" if "rows" in manifest else "–"
        loss = f"{span.dev_loss:.4f}" if span.dev_loss is not None else "–"
        table.append([str(span.index), f"{span.phase.rate:.0%}", f"{span.rate:.0%}", str(span.phase.shots), rows, str(span.phase.epochs), *tokens, loss])
    return table


def _neighbours(run: RunDir, config: RunConfig) -> str:
    """How the examples were found; empty where there are none, or where an earlier version found them."""
    from pi_ray.data.find_neighbours import read_facts, summary

    facts = read_facts(run)
    return summary(facts, config.retrieve.by) if "method" in facts else ""


def _samples(run: RunDir, found: dict[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """The first samples, each with (label, text, equals the answer) for every column."""
    for sample, _ in zip(_log(run.evaluation / "samples.jsonl"), range(most), strict=False):
        answer = sample["answer"].strip()
        outputs = [(numbers.label(n, c), _short(sample["outputs"].get(n, "")), sample["outputs"].get(n, "").strip() == answer) for n, c in found.items()]
        yield {"id": sample["id"], "group": sample.get("group", ""), "query": _short(sample["query"]), "answer": _short(sample["answer"]), "outputs": outputs}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters)"


def _clean(text: str) -> str:
    """Text that HTML can hold: control characters as their pictures (U+2400 and on), lone surrogates as a question mark."""
    seen = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text.replace("\r\n", "\n"))
    return seen.encode("utf-8", "replace").decode("utf-8")
