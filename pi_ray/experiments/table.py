"""A sweep as a table of the paper: metric, tokens, 1/tau, seconds, cost, and the paper's own rows beside them.

The interval of a number covers the choice of test rows and the luck of training (both resampled). Columns are compared
on the same test rows. gap recovered = (PromptIntern - no template) / (full prompt - no template), where there is a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_ray.evaluate import statistics
from pi_ray.evaluate.latency import KINDS
from pi_ray.experiments.sweep import Sweep, SweepRun
from pi_ray.report import cost
from pi_ray.report.summary import format_metric, format_seconds, metric_name, terminal_table
from pi_ray.run.artifact import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

Latencies = dict[str, dict[str, float]]  # column -> median seconds (evaluate.latency), all on one engine


@dataclass(frozen=True)
class ColumnResults:
    """One column's summaries and answers on the test rows, seed by seed."""

    name: str
    label: str
    runs: tuple[SweepRun, ...]
    summaries: tuple[dict[str, Any], ...]
    rows: tuple[list[dict[str, Any]], ...]  # lines of outputs.jsonl
    metric: str

    @property
    def key(self) -> str:
        """The column's name in its own evaluation."""
        return "promptintern" if self.runs[0].trained else "base"

    @property
    def bootstrap(self) -> tuple[int, int]:
        """(resamples, seed)."""
        return self.runs[0].config.evaluate.bootstrap, self.runs[0].seed

    @cached_property
    def statistics(self) -> list[np.ndarray]:
        """One array a seed, (rows, ...), of which `score_function` makes the metric."""
        if self.metric == "bleu":
            return [statistics.bleu_statistics(self.outputs(i), self.answers(i)) for i in range(len(self.rows))]
        return [np.array(self.scores(i)) for i in range(len(self.rows))]

    @cached_property
    def measured(self) -> tuple[float, float, float]:
        """(value, low, high) over seeds and rows."""
        return statistics.over_seeds(self.statistics, *self.bootstrap, score=score_function(self.metric))

    def answers(self, i: int) -> list[str]:
        return [r["answer"] for r in self.rows[i]]

    def outputs(self, i: int) -> list[str]:
        return [r["outputs"][self.key] for r in self.rows[i]]

    def scores(self, i: int) -> list[float]:
        return [r["scores"][self.key][self.metric] for r in self.rows[i]]

    def mean(self, fact: str) -> float:
        return fmean(s[self.key][fact] for s in self.summaries)


def score_function(metric: str) -> Any:
    return (lambda rows: statistics.bleu_of(rows.sum(axis=0))) if metric == "bleu" else np.mean


def read_results(sweep: Sweep) -> list[ColumnResults]:
    """The columns of which at least one seed has been evaluated, with those seeds."""
    found = []
    for name, column in sweep.config.columns.items():
        runs = [r for r in sweep.runs_of(name) if (r.directory.evaluation / "summary.json").is_file()]
        folders = [r.directory.evaluation for r in runs]
        if runs:
            summaries = tuple(json.loads((f / "summary.json").read_bytes()) for f in folders)
            rows = tuple([json.loads(line) for line in (f / "outputs.jsonl").open(encoding="utf-8")] for f in folders)
            found.append(ColumnResults(name, column.label, tuple(runs), summaries, rows, sweep.config.metric))
    return found


QUALITY = ("{metric} (95%)", "by seed", "{groups}", "cut off", "tokens", "1/tau", "less than {mine} by", "p by seed")
REQUEST = ("s, cache off", "s, cache on", "s, merged", "{currency} / 1,000", "same, cached")
NOTHING = "–"


def table_rows(sweep: Sweep, columns: Sequence[ColumnResults], latencies: Latencies) -> Iterator[list[str]]:
    """The head, then one row for each column. The paper's models come last, one cell each."""
    metric, paper, base = sweep.config.metric, sweep.config.paper, sweep.base
    mine = next((c for c in columns if c.name == sweep.config.mine), None)
    groups = list(columns[0].summaries[0].get("groups", {})) if columns else []
    names = {
        "metric": metric_name(metric), "currency": base.cost.currency, "groups": " / ".join(groups) or "groups",
        "mine": sweep.config.columns[sweep.config.mine].label,
    }
    yield ["", *(h.format(**names) for h in (*QUALITY, *REQUEST)), *(f"paper, {model}" for model in paper.rows)]
    whole = _whole_tokens(sweep, columns)
    for c in columns:
        result, low, high = (format_metric(metric, v, 1) for v in c.measured)
        own = [s[c.key] for s in c.summaries]
        price = cost.request_prices(base.cost, c.mean("input_tokens"), c.mean("output_tokens"), c.mean("prefix_tokens"))
        seconds = latencies.get(c.name, {})
        yield [
            c.label,
            f"{result} ({low} to {high})",
            ", ".join(format_metric(metric, s[metric], 1) for s in own),
            " / ".join(format_metric(metric, fmean(s["groups"][g][metric] for s in own)) for g in groups) or NOTHING,
            f"{c.mean('cut_off'):.1%}" if all("cut_off" in s for s in own) else NOTHING,
            f"{c.mean('input_tokens'):,.0f}",
            f"{whole / c.mean('input_tokens'):.1f}x" if whole else NOTHING,
            *_difference_cells(mine, c),
            *(format_seconds(seconds.get(kind)) for kind in KINDS),
            f"{1000 * price.uncached:.3f}",
            f"{1000 * price.cached:.3f}",
            *_paper_cells(sweep, c.name),
        ]


def _whole_tokens(sweep: Sweep, columns: Sequence[ColumnResults]) -> float:
    """Tokens that count as 1.0x: those of the column named so, or of the longest."""
    tokens = {c.name: c.mean("input_tokens") for c in columns}
    return tokens.get(sweep.config.whole or sweep.config.full) or max(tokens.values(), default=0.0)


def _difference_cells(mine: ColumnResults | None, other: ColumnResults) -> list[str]:
    """By how much `other` is below PromptIntern over all seeds, and p of the paired test of each seed."""
    if mine is None or mine is other:
        return [NOTHING, NOTHING]
    scale, score = 1 if mine.metric == "bleu" else 100, score_function(mine.metric)
    found = statistics.difference_over_seeds(mine.statistics, other.statistics, *mine.bootstrap, score=score)
    difference, low, high = (scale * v for v in found)
    p_values = ", ".join(_p_value(mine, i, other) for i in range(len(mine.runs)))
    return [f"{difference:+.1f} ({low:+.1f} to {high:+.1f})", p_values]


def _p_value(mine: ColumnResults, i: int, other: ColumnResults) -> str:
    j = next((j for j, r in enumerate(other.runs) if r.seed == mine.runs[i].seed), 0)
    if mine.metric == "bleu":
        *_, p = statistics.paired_bleu(mine.outputs(i), other.outputs(j), mine.answers(i), *mine.bootstrap)
    else:
        *_, p = statistics.paired_mean(mine.scores(i), other.scores(j), *mine.bootstrap)
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _paper_cells(sweep: Sweep, name: str) -> list[str]:
    paper, column = sweep.config.paper, sweep.config.columns[name].paper
    place = paper.columns.index(column) if column in paper.columns else -1
    cells = [row[place] if place >= 0 else None for row in paper.rows.values()]
    tokens = [f" ({cell[1]:g} tokens)" if cell and len(cell) > 1 else "" for cell in cells]
    return [NOTHING if cell is None else f"{cell[0]:g}{end}" for cell, end in zip(cells, tokens, strict=True)]


def recovered_gap(sweep: Sweep, columns: Sequence[ColumnResults]) -> tuple[str, dict[str, float] | None]:
    """A sentence on the gap recovered, and its numbers where there is one."""
    named = {c.name: c for c in columns}
    wanted = [sweep.config.mine, sweep.config.none, sweep.config.full]
    if not all(name in named for name in wanted):
        return "", None
    mine, none, full = (named[name] for name in wanted)
    score = score_function(sweep.config.metric)
    values = [c.statistics for c in (mine, none, full)]
    found, low, high, resolved = statistics.gap_recovered(values, score, *mine.bootstrap)
    if not resolved or math.isnan(found):
        upper, lower = (f"{c.label} {format_metric(sweep.config.metric, c.measured[0], 1)}" for c in (full, none))
        return f"No gap to recover at this size: {upper} is not clearly above {lower}.", None
    sentence = f"Gap recovered: {found:.0%} (95%: {low:.0%} to {high:.0%}) of what {full.label} is above {none.label}."
    return sentence, {"value": found, "low": low, "high": high}


def result_entries(
    sweep: Sweep, columns: Sequence[ColumnResults], latencies: Latencies, command: str
) -> list[dict[str, Any]]:
    """The numbers for results.json: one entry for each column, seed and metric; the gap recovered has no seed."""

    def entry(column: str, summary: dict[str, Any], metric: str, values: Any, **facts: Any) -> dict[str, Any]:
        value, low, high = (round(v, 4) for v in values)
        return {
            "table": sweep.config.table, "column": column, "task": summary["task"], "model": summary["model"],
            "seed": facts.pop("seed", None), "metric": metric, "value": value, "low": low, "high": high,
            "test_rows": summary["test_rows"], "train_rows": summary["train_rows"], **facts, "command": command,
        }

    entries = []
    for c in columns:
        for run, summary in zip(c.runs, c.summaries, strict=True):
            own = summary[c.key]
            seconds = latencies.get(c.name, own)["latency_s"]
            entries += [
                entry(
                    c.name, summary, metric, (own[metric], *interval), seed=run.seed,
                    split=summary.get("split", "test"), input_tokens=round(own["input_tokens"], 1),
                    seconds_per_instance=round(seconds, 3),
                )
                for metric, interval in own["intervals"].items()
            ]
    _, recovered = recovered_gap(sweep, columns)
    if recovered:
        first = columns[0].summaries[0]
        entries.append(entry(sweep.config.mine, first, "gap_recovered", recovered.values()))
    return entries


KEY = ("table", "column", "task", "model", "seed", "metric", "split", "train_rows", "test_rows")


def merge_results(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Put entries into results.json, in place of older ones with the same KEY."""
    new = {tuple(str(e.get(k)) for k in KEY) for e in entries}
    old = json.loads(path.read_bytes()) if path.exists() else []
    kept = [e for e in old if tuple(str(e.get(k)) for k in KEY) not in new]
    lines = (json.dumps(e, ensure_ascii=False) for e in [*kept, *entries])
    write_atomic(path, "[\n" + ",\n".join(lines) + "\n]\n")


def markdown_table(rows: Sequence[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *body)) + "\n"


def terminal_tables(title: str, rows: Sequence[list[str]]) -> Iterator[Table]:
    """The same for a terminal: quality, then speed and cost, then the paper's rows, each narrow enough to read."""
    ends = [1, 1 + len(QUALITY), 1 + len(QUALITY) + len(REQUEST), len(rows[0])]
    names = (title, "Seconds and cost of a request", "The paper's rows")
    for name, start, end in zip(names, ends, ends[1:], strict=False):
        shown = [i for i in range(start, end) if any(row[i] != NOTHING for row in rows[1:])]
        if shown:
            head, *body = ([row[0], *(row[i] for i in shown)] for row in rows)
            yield terminal_table(name, head, body)
