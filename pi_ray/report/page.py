"""report.html: one self-contained page that a manager understands and an engineer can check. No network, no scripts.

Everything from outside (rows, model output, config) is escaped: by jinja2's autoescape in page.html, by charts.py in
pictures. A content-security policy forbids scripts and loads even so, because the samples are whatever a model wrote.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pi_ray import __version__, progress
from pi_ray.config import RunConfig, dump_config
from pi_ray.conversation import last_messages
from pi_ray.data.find_neighbours import read_facts, summarise_facts
from pi_ray.errors import CorruptArtifactError, DataError
from pi_ray.evaluate.columns import LABELS
from pi_ray.evaluate.knowledge import read_knowledge
from pi_ray.metrics.names import metric_in_sentence, metric_name
from pi_ray.report import charts, cost
from pi_ray.report import summary as numbers
from pi_ray.report.knowledge import page_knowledge
from pi_ray.report.loss_plot import phase_spans, read_log, read_template_entries, read_updates
from pi_ray.run.artifact import MANIFEST_HASH, read_manifest, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases

LONGEST_TEXT = 4000  # characters of one sample's text that are shown


def write_report(run: RunDir, config: RunConfig) -> Path:
    """Write the run's report from eval/, train.jsonl, phases/ and templates/; what is missing there is left out.

    Raises DataError when the run was not evaluated, CorruptArtifactError when its summary cannot be read.
    """
    path = run.evaluation / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: not there; run 'pi-ray evaluate' before the report") from None
    except ValueError as error:
        raise CorruptArtifactError(f"{path}: not readable as JSON ({error}); run 'pi-ray evaluate' again") from error
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    page = templates.get_template("page.html").render(_context(run, config, summary))
    # control characters become their pictures (U+2400 and on), lone surrogates a question mark
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    text = page.replace("\r\n", "\n").translate(pictures).encode("utf-8", "replace").decode("utf-8")
    return write_atomic(run.report, text)


def _context(run: RunDir, config: RunConfig, summary: dict[str, Any]) -> dict[str, Any]:
    metric, phases = numbers.main_metric(summary), plan_phases(config.schedule)
    updates, plain = read_updates(run.train_log), read_updates(run.baseline("plain").train_log)
    spans, found = phase_spans(config, updates), numbers.summary_columns(summary)
    facts = read_facts(run)  # of how the examples were found; an earlier version did not name a method
    return {
        "version": __version__, "colours": charts.COLOURS, "summary": summary,
        "names": [(name, numbers.column_label(name, column)) for name, column in found.items()],
        "headline": numbers.headline(summary, phases[-1]),
        "verdict": cost.verdict(summary, config.cost),
        "findings": list(numbers.findings(summary)), "caveats": [*_stale(run, summary), *numbers.caveats(summary)],
        "tiles": _tiles(summary, config, metric),
        "lines": numbers.table_lines(summary), "group_lines": numbers.group_lines(summary, metric),
        "metric": metric_name(metric), "knows": page_knowledge(read_knowledge(run.evaluation)),
        "cost": _cost(summary, config),
        "same_tokens": summary.get("plain", {}).get("input_tokens") == summary["promptintern"]["input_tokens"],
        "phases": _phase_lines(run, spans),
        "neighbours": summarise_facts(facts, config.retrieve.by) if "method" in facts else "",
        "tokens_svg": charts.tokens_chart(summary), "quality_svg": charts.quality_chart(summary, metric),
        "training_svg": charts.training_chart(updates, plain, spans) if updates else "",
        "samples": list(_samples(run, found, config.evaluate.samples)),
        "templates": read_template_entries(run), "config": dump_config(config),
        "command": summary.get("command") or f"pi-ray run {shlex.quote(str(run.config))}",
    }


def _stale(run: RunDir, summary: dict[str, Any]) -> Iterator[str]:
    """A sentence where the run was trained again since it was evaluated."""
    here = (read_manifest(run.best) or {}).get(MANIFEST_HASH, "")
    if here and summary.get("adapter_sha256", here) != here:
        yield "These scores are those of an earlier adapter of this run: 'pi-ray evaluate' measures the present one."


def _tiles(summary: dict[str, Any], config: RunConfig, metric: str) -> list[tuple[str, str, str]]:
    """The four numbers at the top: (number, its name, the number that it is compared with)."""
    mine, full = summary["promptintern"], summary["base_full_prompt"]
    money, fewer = cost.summary_economics(summary, config.cost), numbers.token_reduction(summary, mine)
    paid = f"{money.requests_cached:,}" if money.requests_cached is not None else "never"
    took, took_cached = (numbers.format_seconds(full.get(kind)) for kind in ("latency_s", "latency_cached_s"))
    against = f"{numbers.format_metric(metric, full[metric])} base with full prompt"
    if plain := summary.get("plain"):
        against += f", {numbers.format_metric(metric, plain[metric])} plain fine-tuning"
    tokens = f"{mine['input_tokens']:,.0f} instead of {full['input_tokens']:,.0f}"
    return [
        (numbers.format_percent(fewer), "fewer input tokens per request", tokens),
        (numbers.format_metric(metric, mine[metric]), metric_in_sentence(metric), against),
        (numbers.format_seconds(mine.get("latency_s")), "per request", f"full prompt {took}, cached {took_cached}"),
        (paid, "requests until training is paid back", "against the full prompt with a cached prefix"),
    ]


def _cost(summary: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Cells of the cost section, as text."""
    money, prices = cost.summary_economics(summary, config.cost), config.cost

    def write(*amounts: float) -> list[str]:
        return [progress.format_money(amount, prices.currency) for amount in amounts]

    def monthly(price: cost.Price) -> list[str]:
        return write(price.uncached * prices.requests_per_month, price.cached * prices.requests_per_month)

    return {
        "lines": [write(1000 * p.uncached, 1000 * p.cached) + monthly(p) for p in money.prices.values()],
        "requests_per_month": f"{prices.requests_per_month:,}",
        "training": [
            (LABELS.get(name, name), _trained(facts), *write(cost.trained_cost(prices, facts)))
            for name, facts in summary["train"].items()
        ],
        "saving": monthly(money.saving),
        "break_even": [
            f"{n:,} requests" if n is not None else "never" for n in (money.requests_uncached, money.requests_cached)
        ],
        "prices": f"{prices.currency} per million tokens: input {prices.input:g}, cached input "
        f"{prices.cached_input:g}, output {prices.output:g}; one worker for an hour {prices.training_hour:g}",
    }


def _trained(facts: dict[str, Any]) -> str:
    hours = facts["seconds"] / 3600
    time = f"{hours:.1f} h" if hours >= 1.5 else f"{facts['seconds'] / 60:.1f} min"
    workers = f"{facts['workers']} worker{'s' * (facts['workers'] != 1)}"
    return f"{facts['updates']:,} updates, {facts['tokens']:,} tokens, {time} on {workers}"


def _phase_lines(run: RunDir, spans: Sequence[charts.PhaseSpan]) -> list[list[str]]:
    table = []
    for span in spans:
        manifest = read_manifest(run.phase(span.index)) or {}
        counts = manifest.get("tokens", {})
        tokens = [f"{counts[k]:,.0f}" if k in counts else "–" for k in ("prefix", "row_mean", "label_mean")]
        rows = f"{manifest['rows']:,}" if "rows" in manifest else "–"
        loss = f"{span.dev_loss:.4f}" if span.dev_loss is not None else "–"
        asked = [str(span.index), f"{span.phase.rate:.0%}", f"{span.rate:.0%}", str(span.phase.shots)]
        table.append([*asked, rows, str(span.phase.epochs), *tokens, loss])
    return table


def _samples(run: RunDir, found: dict[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """The first samples, each with (label, text, equals the answer) for every column."""
    for sample in islice(read_log(run.evaluation / "samples.jsonl"), most):
        texts = [(numbers.column_label(n, c), sample["outputs"].get(n, "")) for n, c in found.items()]
        outputs = [(label, _short(text), text.strip() == sample["answer"].strip()) for label, text in texts]
        query, answer = _short(last_messages(sample["query"])), _short(sample["answer"])
        shown = {"query": query, "answer": answer, "outputs": outputs}
        yield {"id": sample["id"], "group": sample.get("group", ""), **shown}


def _short(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]} … ({more:,} more characters)"
