"""A sweep as a table of the paper: metric, tokens, 1/tau, seconds, cost, and the paper's own rows beside them.

The interval of a number covers the choice of test rows and the luck of training (both resampled). Columns are compared
on the same test rows. gap recovered = (PromptIntern - no template) / (full prompt - no template), where there is a gap.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from pi_ray.errors import DataError
from pi_ray.evaluate import statistics
from pi_ray.evaluate.generation_workers import KINDS
from pi_ray.evaluate.scoring import clusters_of
from pi_ray.experiments.sweep import Sweep, SweepRun
from pi_ray.metrics.names import metric_name
from pi_ray.report import cost
from pi_ray.report.summary import format_metric, format_seconds, terminal_table
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir

COLUMN = {True: "promptintern", False: "base"}  # of a run's summary, by whether it was trained
Latencies = dict[str, dict[str, float]]  # column -> median seconds of each of KINDS, all on one engine


@dataclass(frozen=True)
class ColumnResults:
    """One column's results on the test rows; a list has one item for each seed."""

    name: str
    label: str
    metric: str
    runs: list[SweepRun]
    summaries: list[dict[str, Any]]
    facts: list[dict[str, Any]]  # the column's own block of a summary
    answers: list[list[str]]
    outputs: list[list[str]]
    scores: list[list[float]]
    clusters: list[str] | None = None  # of each row, where rows are turns of conversations

    @property
    def bootstrap(self) -> tuple[int, int]:
        """(resamples, seed)."""
        return self.runs[0].config.evaluate.bootstrap, self.runs[0].seed

    @cached_property
    def statistics(self) -> list[np.ndarray]:
        """One array a seed, (rows or their clusters, ...), of which `score_function` makes the metric."""
        if self.metric == "bleu":
            counted = list(map(statistics.bleu_statistics, self.outputs, self.answers))
        else:
            counted = [np.stack([scores, np.ones(len(scores))], axis=1) for scores in self.scores]
        return [statistics.sum_clusters(of_seed, self.clusters) for of_seed in counted]

    @cached_property
    def measured(self) -> tuple[float, float, float]:
        """(value, low, high) over seeds and rows."""
        found = statistics.over_seeds(self.statistics, *self.bootstrap, score=score_function(self.metric))
        if self.metric == "bleu":
            return found
        return statistics.exact_ends(found, np.array(self.scores), len(self.statistics[0]))

    def mean(self, fact: str) -> float:
        return fmean(f[fact] for f in self.facts)


def score_function(metric: str) -> Any:
    """The metric of an array of ColumnResults.statistics: BLEU, or the mean out of sums and counts."""
    score = statistics.bleu_of if metric == "bleu" else lambda sums: sums[0] / sums[1]
    return lambda rows: score(rows.sum(axis=0))


def read_summary(run: RunDir, trained: bool, metric: str) -> dict[str, Any]:
    """The summary of an evaluated run. Raises DataError where its column, a trained one or the base, lacks `metric`."""
    summary = json.loads((run.evaluation / "summary.json").read_bytes())
    facts = summary[COLUMN[trained]]
    if facts.get(metric) is None:
        cure = "take one of these as table.metric, or have it measured (pass_at_1: task.allow_code_execution=true)"
        raise DataError(f"the table's metric is {metric}, and its runs have {', '.join(facts['intervals'])}; {cure}")
    return summary


def read_results(sweep: Sweep) -> list[ColumnResults]:
    """The columns of which at least one seed has been evaluated, with those seeds. Raises what `read_summary` raises.
    """
    found, metric = [], sweep.metric
    for name, column in sweep.config.columns.items():
        runs = [r for r in sweep.runs_of(name) if (r.directory.evaluation / "summary.json").is_file()]
        if not runs:
            continue
        folders, key = [r.directory.evaluation for r in runs], COLUMN[column.trained]
        summaries = [read_summary(r.directory, column.trained, metric) for r in runs]
        rows = [[json.loads(line) for line in (f / "outputs.jsonl").open(encoding="utf-8")] for f in folders]
        found.append(ColumnResults(
            name, column.label, metric, runs, summaries, facts=[s[key] for s in summaries],
            answers=[[r["answer"] for r in of_seed] for of_seed in rows],
            outputs=[[r["outputs"][key] for r in of_seed] for of_seed in rows],
            scores=[[r["scores"][key].get(metric) for r in of_seed] for of_seed in rows],
            clusters=clusters_of(runs[0].config, [r["id"] for r in rows[0]]),
        ))
    return found


QUALITY = ("{metric} (95%)", "by seed", "{groups}", "cut off", "tokens", "1/tau", "less than {mine} by", "p by seed")
REQUEST = ("s, cache off", "s, cache on", "s, merged", "{currency} / 1,000", "same, cached")
NOTHING = "–"


def table_rows(sweep: Sweep, columns: Sequence[ColumnResults], latencies: Latencies) -> Iterator[list[str]]:
    """The head, then one row for each column. The paper's models come last, one cell each."""
    metric, paper, base = sweep.metric, sweep.config.paper, sweep.base
    mine = next((c for c in columns if c.name == sweep.config.mine), None)
    groups = list(columns[0].summaries[0].get("groups", {})) if columns else []
    of_paper = f" ({paper.metric})" if paper.metric else ""
    names = {
        "metric": metric_name(metric), "currency": base.cost.currency, "groups": " / ".join(groups) or "groups",
        "mine": sweep.config.columns[sweep.config.mine].label,
    }
    heads = [h.format(**names) for h in (*QUALITY, *REQUEST)]
    yield ["", *heads, *(f"paper, {model}{of_paper}" for model in paper.rows)]
    tokens = {c.name: c.mean("input_tokens") for c in columns}
    whole = tokens.get(sweep.config.whole or sweep.config.full) or max(tokens.values(), default=0.0)  # of 1.0x
    for c in columns:
        result, low, high = (format_metric(metric, v, 1) for v in c.measured)
        by_group = (format_metric(metric, fmean(f["groups"][g][metric] for f in c.facts)) for g in groups)
        price = cost.request_prices(base.cost, tokens[c.name], c.mean("output_tokens"), c.mean("prefix_tokens"))
        seconds = latencies.get(c.name, {})
        yield [
            c.label,
            f"{result} ({low} to {high})",
            ", ".join(format_metric(metric, s[metric], 1) for s in c.facts),
            " / ".join(by_group) or NOTHING,
            f"{c.mean('cut_off'):.1%}" if all("cut_off" in s for s in c.facts) else NOTHING,
            f"{tokens[c.name]:,.0f}",
            f"{whole / tokens[c.name]:.1f}x" if whole else NOTHING,
            *_difference_cells(mine, c),
            *(format_seconds(seconds.get(kind)) for kind in KINDS),
            f"{1000 * price.uncached:.3f}", f"{1000 * price.cached:.3f}",
            *_paper_cells(sweep, c.name),
        ]


def _difference_cells(mine: ColumnResults | None, other: ColumnResults) -> list[str]:
    """By how much `other` is below PromptIntern over all seeds, and p of the paired test of each seed."""
    if mine is None or mine is other:
        return [NOTHING, NOTHING]
    scale, score = 1 if mine.metric == "bleu" else 100, score_function(mine.metric)
    found = statistics.difference_over_seeds(mine.statistics, other.statistics, *mine.bootstrap, score=score)
    difference, low, high = (scale * v for v in found)
    p_values, how = [], (*mine.bootstrap, mine.clusters)
    for i, run in enumerate(mine.runs):
        j = next((j for j, r in enumerate(other.runs) if r.seed == run.seed), 0)
        if mine.metric == "bleu":
            *_, p = statistics.paired_bleu(mine.outputs[i], other.outputs[j], mine.answers[i], *how)
        else:
            *_, p = statistics.paired_mean(mine.scores[i], other.scores[j], *how)
        p_values.append(f"{p:.3f}" if p >= 0.001 else "<0.001")
    return [f"{difference:+.1f} ({low:+.1f} to {high:+.1f})", ", ".join(p_values)]


def _paper_cells(sweep: Sweep, name: str) -> list[str]:
    paper, column = sweep.config.paper, sweep.config.columns[name].paper
    place = paper.columns.index(column) if column in paper.columns else -1
    cells = [row[place] if place >= 0 else None for row in paper.rows.values()]
    tokens = [f" ({cell[1]:g} tokens)" if cell and len(cell) > 1 else "" for cell in cells]
    return [NOTHING if cell is None else f"{cell[0]:g}{end}" for cell, end in zip(cells, tokens, strict=True)]


def recovered_gap(sweep: Sweep, columns: Sequence[ColumnResults]) -> tuple[str, dict[str, float] | None]:
    """A sentence on the gap recovered, and its numbers where there is one."""
    named = {c.name: c for c in columns}
    try:
        mine, none, full = (named[name] for name in (sweep.config.mine, sweep.config.none, sweep.config.full))
    except KeyError:
        return "", None
    values = [c.statistics for c in (mine, none, full)]
    found, low, high, resolved = statistics.gap_recovered(values, score_function(mine.metric), *mine.bootstrap)
    if not resolved:
        upper, lower = (f"{c.label} {format_metric(sweep.metric, c.measured[0], 1)}" for c in (full, none))
        return f"No gap to recover at this size: {upper} is not clearly above {lower}.", None
    sentence = f"Gap recovered: {found:.0%} (95%: {low:.0%} to {high:.0%}) of what {full.label} is above {none.label}."
    return sentence, {"value": found, "low": low, "high": high}


def result_entries(
    sweep: Sweep, columns: Sequence[ColumnResults], latencies: Latencies, command: str
) -> list[dict[str, Any]]:
    """The numbers for results.json: one entry for each column, seed and metric; the gap recovered has no seed."""
    entries = []

    def add(column: str, summary: dict[str, Any], seed: int | None, metric: str, values: Any, **facts: Any) -> None:
        value, low, high = (round(v, 4) for v in values)
        entries.append({
            "table": sweep.config.table, "column": column, "task": summary["task"], "model": summary["model"],
            "seed": seed, "metric": metric, "value": value, "low": low, "high": high,
            "test_rows": summary["test_rows"], "train_rows": summary["train_rows"], **facts, "command": command,
        })

    for c in columns:
        for run, summary, own in zip(c.runs, c.summaries, c.facts, strict=True):
            seconds = round(latencies.get(c.name, own)["latency_s"], 3)
            for metric, interval in own["intervals"].items():
                add(
                    c.name, summary, run.seed, metric, (own[metric], *interval), split=summary.get("split", "test"),
                    input_tokens=round(own["input_tokens"], 1), seconds_per_instance=seconds,
                )
    _, recovered = recovered_gap(sweep, columns)
    if recovered:
        add(sweep.config.mine, columns[0].summaries[0], None, "gap_recovered", recovered.values())
    return entries


def merge_results(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Put entries into results.json, in place of older ones of the same numbers."""
    def key(entry: dict[str, Any]) -> list[str]:
        names = ("table", "column", "task", "model", "seed", "metric", "split", "train_rows", "test_rows")
        return [str(entry.get(name)) for name in names]

    old, new = json.loads(path.read_bytes()) if path.exists() else [], [key(e) for e in entries]
    kept = [e for e in old if key(e) not in new]
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
