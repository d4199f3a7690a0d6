"""A family of runs as a table of the paper: metric, tokens, 1/tau, seconds, cost, and the paper's own rows beside them.

The interval of a number covers the choice of test rows and the luck of training (both resampled). Columns are compared on the same test
rows. `gap recovered` = (PromptIntern - no template) / (full prompt - no template), which is said only where there is a gap.
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

from pi_ray.evaluate.statistics import bleu_of, bleu_statistics, difference, gap_recovered, over_seeds, paired_bleu, paired_mean
from pi_ray.experiments.sweep import Family, Member
from pi_ray.report import cost
from pi_ray.report.summary import metric_name, seconds, value
from pi_ray.run.artifact import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

Speeds = dict[str, dict[str, float]]  # column -> median seconds (answers.medians), all on one engine


@dataclass(frozen=True)
class Column:
    """What one column's runs gave on the test rows, seed by seed."""

    name: str
    label: str
    members: tuple[Member, ...]
    summaries: tuple[dict[str, Any], ...]
    rows: tuple[list[dict[str, Any]], ...]  # lines of outputs.jsonl
    metric: str

    @property
    def key(self) -> str:
        """The column's name in its own evaluation."""
        return "promptintern" if self.members[0].trained else "base"

    @cached_property
    def statistics(self) -> list[np.ndarray]:
        """One array a seed, (rows, ...), of which `score` makes the metric."""
        if self.metric == "bleu":
            return [bleu_statistics(self.outputs(i), [r["answer"] for r in rows]) for i, rows in enumerate(self.rows)]
        return [np.array(self.scores(i)) for i in range(len(self.rows))]

    @cached_property
    def measured(self) -> tuple[float, float, float]:
        """(value, low, high) over seeds and rows."""
        return over_seeds(self.statistics, *self._bootstrap, score=score_of(self.metric))

    def outputs(self, i: int) -> list[str]:
        return [r["outputs"][self.key] for r in self.rows[i]]

    def scores(self, i: int) -> list[float]:
        return [r["scores"][self.key][self.metric] for r in self.rows[i]]

    def mean(self, fact: str) -> float:
        return fmean(s[self.key][fact] for s in self.summaries)

    @property
    def _bootstrap(self) -> tuple[int, int]:
        return self.members[0].config.evaluate.bootstrap, self.members[0].seed


def score_of(metric: str) -> Any:
    return (lambda rows: bleu_of(rows.sum(axis=0))) if metric == "bleu" else np.mean


def read(family: Family) -> list[Column]:
    """The columns of which at least one seed has been evaluated, with the seeds there are."""
    found = []
    for name, column in family.config.columns.items():
        members = [m for m in family.of(name) if (m.run.evaluation / "summary.json").is_file()]
        if members:
            summaries = tuple(json.loads((m.run.evaluation / "summary.json").read_bytes()) for m in members)
            rows = tuple([json.loads(line) for line in (m.run.evaluation / "outputs.jsonl").open(encoding="utf-8")] for m in members)
            found.append(Column(name, column.label, tuple(members), summaries, rows, family.config.metric))
    return found


HEAD = ("", "{metric} (95%)", "by seed", "{groups}", "cut off", "tokens", "1/tau", "s, cache off", "s, cache on", "s, merged", "{currency} / 1,000", "same, cached", "less than {mine} by", "p by seed")


def lines(family: Family, columns: Sequence[Column], speeds: Speeds) -> Iterator[list[str]]:
    """The table's head and lines, ready to print. The paper's models come last, one column each."""
    metric, paper, base = family.config.metric, family.config.paper, family.base
    mine = next((c for c in columns if c.name == family.config.mine), None)
    label = family.config.columns[family.config.mine].label
    groups = list(columns[0].summaries[0].get("groups", {})) if columns else []
    named = {"metric": metric_name(metric), "currency": base.cost.currency, "mine": label, "groups": " / ".join(groups) or "groups"}
    yield [h.format(**named) for h in HEAD] + [f"paper, {model}" for model in paper.rows]
    whole = _whole(family, columns)
    for c in columns:
        _, low, high = c.measured
        price = cost.price(base.cost, c.mean("input_tokens"), c.mean("output_tokens"), c.mean("prefix_tokens"))
        own = speeds.get(c.name, {})
        yield [
            c.label,
            f"{value(metric, c.measured[0], 1)} ({value(metric, low, 1)} to {value(metric, high, 1)})",
            ", ".join(value(metric, s[c.key][metric], 1) for s in c.summaries),
            " / ".join(value(metric, fmean(s[c.key]["groups"][g][metric] for s in c.summaries)) for g in groups) or "–",
            f"{c.mean('cut_off'):.1%}" if all("cut_off" in s[c.key] for s in c.summaries) else "–",
            f"{c.mean('input_tokens'):,.0f}",
            f"{whole / c.mean('input_tokens'):.1f}x" if whole else "–",
            *(seconds(own.get(kind)) for kind in ("latency_s", "latency_cached_s", "latency_merged_s")),
            f"{1000 * price.uncached:.3f}",
            f"{1000 * price.cached:.3f}",
            *_against(mine, c),
            *_paper(family, c.name),
        ]


def _whole(family: Family, columns: Sequence[Column]) -> float:
    """Tokens that count as 1.0x: those of the column named so, or of the longest."""
    named = family.config.whole or family.config.full
    tokens = {c.name: c.mean("input_tokens") for c in columns}
    return tokens.get(named) or max(tokens.values(), default=0.0)


def _against(mine: Column | None, other: Column) -> list[str]:
    """By how much `other` is below PromptIntern over all seeds, and the paired test of each seed."""
    if mine is None or mine is other:
        return ["–", "–"]
    scale = 1 if mine.metric == "bleu" else 100
    found, low, high = (scale * v for v in difference(mine.statistics, other.statistics, *mine._bootstrap, score=score_of(mine.metric)))
    return [f"{found:+.1f} ({low:+.1f} to {high:+.1f})", ", ".join(_p(mine, i, other) for i in range(len(mine.members)))]


def _p(mine: Column, i: int, other: Column) -> str:
    j = next((j for j, m in enumerate(other.members) if m.seed == mine.members[i].seed), 0)
    if mine.metric == "bleu":
        *_, p = paired_bleu(mine.outputs(i), other.outputs(j), [r["answer"] for r in mine.rows[i]], *mine._bootstrap)
    else:
        *_, p = paired_mean(mine.scores(i), other.scores(j), *mine._bootstrap)
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _paper(family: Family, name: str) -> list[str]:
    paper, column = family.config.paper, family.config.columns[name].paper
    place = paper.columns.index(column) if column in paper.columns else -1
    cells = [row[place] if place >= 0 else None for row in paper.rows.values()]
    return ["–" if cell is None else f"{cell[0]:g}" + (f" ({cell[1]:g} tokens)" if len(cell) > 1 else "") for cell in cells]


def gap(family: Family, columns: Sequence[Column]) -> tuple[str, dict[str, float] | None]:
    """A sentence on the gap recovered, and its numbers where there is one."""
    named = {c.name: c for c in columns}
    wanted = [family.config.mine, family.config.none, family.config.full]
    if not all(name in named for name in wanted):
        return "", None
    mine, none, full = (named[name] for name in wanted)
    metric = family.config.metric
    found, low, high, resolved = gap_recovered([c.statistics for c in (mine, none, full)], score_of(metric), *mine._bootstrap)
    if not resolved or math.isnan(found):
        return (
            f"No gap to recover at this size: {full.label} {value(metric, full.measured[0], 1)} is not clearly above {none.label} {value(metric, none.measured[0], 1)}.",
            None,
        )
    return f"Gap recovered: {found:.0%} (95%: {low:.0%} to {high:.0%}) of what {full.label} is above {none.label}.", {"value": found, "low": low, "high": high}


def entries(family: Family, columns: Sequence[Column], speeds: Speeds, command: str) -> list[dict[str, Any]]:
    """The numbers for results.json: one entry for each column, seed and metric; the gap recovered has no seed."""
    made = []
    for c in columns:
        for member, summary in zip(c.members, c.summaries, strict=True):
            own, shared = summary[c.key], {"table": family.config.table, "column": c.name, "task": summary["task"], "model": summary["model"], "seed": member.seed}
            for metric, (low, high) in own["intervals"].items():
                made.append({
                    **shared, "metric": metric, "value": round(own[metric], 4), "low": round(low, 4), "high": round(high, 4), "test_rows": summary["test_rows"],
                    "train_rows": summary["train_rows"], "split": summary.get("split", "test"), "input_tokens": round(own["input_tokens"], 1),
                    "seconds_per_instance": round(speeds.get(c.name, own)["latency_s"], 3), "command": command,
                })
    _, recovered = gap(family, columns)
    if recovered:
        first = columns[0].summaries[0]
        made.append({
            "table": family.config.table, "column": family.config.mine, "task": first["task"], "model": first["model"], "seed": None, "metric": "gap_recovered",
            **{k: round(v, 4) for k, v in recovered.items()}, "test_rows": first["test_rows"], "train_rows": first["train_rows"], "command": command,
        })
    return made


KEY = ("table", "column", "task", "model", "seed", "metric", "split", "train_rows", "test_rows")


def merge(path: Path, made: Sequence[dict[str, Any]]) -> None:
    """Put entries into results.json, in place of older ones of the same table, column, task, model, seed, metric and size."""
    new = {tuple(str(e.get(k)) for k in KEY) for e in made}
    kept = [e for e in (json.loads(path.read_bytes()) if path.exists() else []) if tuple(str(e.get(k)) for k in KEY) not in new]
    write_atomic(path, "[\n" + ",\n".join(json.dumps(e, ensure_ascii=False) for e in [*kept, *made]) + "\n]\n")


def markdown(rows: Sequence[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *body)) + "\n"


def render(title: str, rows: Sequence[list[str]]) -> Iterator[Table]:
    """The same for a terminal: quality, then speed and cost, then the paper's rows, each narrow enough to read."""
    quality, money, paper = [1, 2, 3, 4, 5, 6, 12, 13], [7, 8, 9, 10, 11], range(len(HEAD), len(rows[0]))
    for part, name in ((quality, title), (money, "Seconds and cost of a request"), (paper, "The paper's rows")):
        shown = [i for i in part if any(row[i] != "–" for row in rows[1:])]
        if shown:
            yield _part(name, [[row[0], *(row[i] for i in shown)] for row in rows])


def _part(title: str, rows: Sequence[list[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(rows[0]):
        out.add_column(Text(name), justify="right" if i else "left")
    for row in rows[1:]:
        out.add_row(*map(Text, row))
    return out
