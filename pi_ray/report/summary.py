"""What eval/summary.json says: the columns, their metrics, who is better, and the sentences that a reader should take away.

A column is one way of answering (base model, full prompt, plain fine-tuning, PromptIntern). Two columns are called different only
where their 95% intervals do not overlap, which is stricter than a test of the difference. Money is in cost.py, the page in report.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pi_ray.evaluate.columns import LABELS
from pi_ray.schedule import Phase

if TYPE_CHECKING:
    from rich.table import Table

METRIC_NAMES = {"exact_match": "Exact match", "bleu": "BLEU", "execution": "Execution match"}
PROBES = (  # probe.py
    ("off_task_perplexity", "Perplexity on other text", "{:.1f}"),
    ("recited", "Template recited when asked", "{:.0%}"),
    ("longest_run", "Longest run of its words", "{:.0f}"),
)
WEAK = 0.1  # a metric below this in every column tells them apart badly


def columns(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> column, in the order of the tables; a name that LABELS lacks comes before PromptIntern."""
    found = {k: v for k, v in summary.items() if isinstance(v, dict) and "exact_match" in v}
    order = [*(k for k in LABELS if k != "promptintern"), *(k for k in found if k not in LABELS), "promptintern"]
    return {k: found[k] for k in order if k in found}


def label(name: str, column: dict[str, Any]) -> str:
    return column.get("label") or LABELS.get(name, name)


def metrics(summary: dict[str, Any]) -> list[str]:
    """Metrics of the tables: exact match, BLEU, then the task's own (those with an interval)."""
    own = {m for c in columns(summary).values() for m in c.get("intervals", {})}
    return ["exact_match", "bleu", *sorted(own - {"exact_match", "bleu"})]


def main_metric(summary: dict[str, Any]) -> str:
    """The metric of headlines and verdicts: exact match, or where that is near 0 in every column the task's own, or else BLEU."""
    exact, bleu, *own = metrics(summary)
    found = columns(summary).values()
    return next((m for m in (exact, *own) if any(c.get(m, 0) >= WEAK for c in found)), bleu)


def interval(column: dict[str, Any], metric: str) -> tuple[float, float]:
    """The 95% interval; the value itself twice where none was computed."""
    low, high = column.get("intervals", {}).get(metric) or (column[metric], column[metric])
    return low, high


def standing(one: dict[str, Any], other: dict[str, Any], metric: str) -> str:
    """How `one` compares to `other`: "better" or "worse" where the 95% intervals are apart, else "level"."""
    (low, high), (other_low, other_high) = interval(one, metric), interval(other, metric)
    return "better" if low > other_high else "worse" if high < other_low else "level"


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())


def in_sentence(metric: str) -> str:
    return metric_name(metric) if metric == "bleu" else metric_name(metric).lower()


def percent(share: float) -> str:
    """Whole percents; a decimal where rounding would claim all or nothing (99.6% is not 100%)."""
    text = f"{share:.0%}"
    return f"{share:.1%}" if (text in ("100%", "0%") and share not in (0, 1)) else text


def value(metric: str, number: float, digits: int = 0) -> str:
    """A metric as people write it: BLEU on its scale of 100, everything else in percent."""
    if metric == "bleu":
        return f"{number:.1f}"
    return f"{number:.{digits}%}" if digits else percent(number)


def seconds(number: float | None) -> str:
    """A latency with a fitting unit."""
    if number is None:
        return "–"
    return f"{number * 1000:.0f} ms" if number < 0.9995 else f"{number:.2f} s"


def reduction(summary: dict[str, Any], column: dict[str, Any]) -> float:
    """Share of the full prompt's input tokens that `column` does not send; negative where it sends more."""
    full = summary["base_full_prompt"]["input_tokens"]
    return 1 - column["input_tokens"] / full if full else 0.0


@dataclass(frozen=True)
class Line:
    """One line of the main table: a name and, for each column, a cell and a small note (such as its interval)."""

    name: str
    cells: list[tuple[str, str]]


def lines(summary: dict[str, Any]) -> list[Line]:
    """The main table, used for the terminal and the page."""
    found = columns(summary)
    table = [Line(metric_name(m), [_measured(c, m) for c in found.values()]) for m in metrics(summary)]
    table.append(Line("Input tokens per request", [(f"{c['input_tokens']:,.0f}", "") for c in found.values()]))
    table.append(Line("Fewer than the full prompt", [_fewer(summary, n, c) for n, c in found.items()]))
    table.append(Line("Output tokens per request", [(f"{c['output_tokens']:,.0f}", "") for c in found.values()]))
    if any(c.get("cut_off") for c in found.values()):
        at = f"at {summary['max_new_tokens']} tokens"
        table.append(Line("Answers cut off", [(f"{c['cut_off']:.1%}", at) if "cut_off" in c else ("–", "") for c in found.values()]))
    table.append(Line("Latency, no prefix cache", [(seconds(c.get("latency_s")), "") for c in found.values()]))
    table.append(Line("Latency, prefix cached", [(seconds(c.get("latency_cached_s")), "") for c in found.values()]))
    if any("latency_merged_s" in c for c in found.values()):
        table.append(Line("Latency, adapter merged", [(seconds(c.get("latency_merged_s")), "") for c in found.values()]))
    for key, name, text in PROBES:
        if any(key in c for c in found.values()):
            table.append(Line(name, [(text.format(c[key]) if key in c else "–", "") for c in found.values()]))
    return table


def _measured(column: dict[str, Any], metric: str) -> tuple[str, str]:
    if column.get(metric) is None:
        return "–", ""
    low, high = interval(column, metric)
    return value(metric, column[metric], 1), "" if low == high else f"{value(metric, low, 1)} to {value(metric, high, 1)}"


def _fewer(summary: dict[str, Any], name: str, column: dict[str, Any]) -> tuple[str, str]:
    return ("–", "") if name == "base_full_prompt" else (percent(reduction(summary, column)), "")


@dataclass(frozen=True)
class GroupLine:
    """One group of test rows in the per-group table; `cells` as in Line."""

    group: str
    rows: int
    cells: list[tuple[str, str]]


def group_lines(summary: dict[str, Any], metric: str) -> list[GroupLine]:
    """`metric` for each group of test rows and column; empty where the task names no groups."""
    found = columns(summary)
    return [
        GroupLine(group, rows, [_measured(c.get("groups", {}).get(group, {}), metric) for c in found.values()])
        for group, rows in summary.get("groups", {}).items()
        if group or len(summary["groups"]) > 1
    ]


def table(summary: dict[str, Any]) -> Table:
    """The main table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    found = columns(summary)
    out = Table(title=Text(f"{summary['run']}: {summary['test_rows']:,} test rows, 95% intervals"), title_justify="left")
    out.add_column("")
    for name, column in found.items():
        out.add_column(Text(label(name, column)), justify="right", style="bold" if name == "promptintern" else "")
    for line in lines(summary):
        out.add_row(line.name, *(_stacked(c) for c in line.cells))
    for line in group_lines(summary, main_metric(summary)):
        name = Text(f"{metric_name(main_metric(summary))}: {line.group or 'other rows'} ({line.rows:,})")
        out.add_row(name, *(_stacked(c) for c in line.cells))
    return out


def _stacked(cell: tuple[str, str]) -> str:
    return f"{cell[0]}\n[not bold dim]{cell[1]}[/]" if cell[1] else cell[0]


def headline(summary: dict[str, Any], last: Phase) -> str:
    """The result in one or two plain sentences; `last` is the phase whose prompt inference sends."""
    mine, full, metric = summary["promptintern"], summary["base_full_prompt"], main_metric(summary)
    sends = "the query alone" if not last.rate and not last.shots else "a shortened prompt"
    fewer = reduction(summary, mine)
    tokens = f"{mine['input_tokens']:,.0f} input tokens instead of {full['input_tokens']:,.0f}"
    saving = f"{tokens} ({percent(fewer)} fewer)" if fewer > 0 else f"{tokens}, which saves nothing"
    link = {"better": "against", "worse": "below", "level": "level with"}[standing(mine, full, metric)]
    quality = f"{value(metric, mine[metric])}, {link} {value(metric, full[metric])} for the base model with the full prompt"
    return f"The adapter answers with {sends}: {saving}. Its {in_sentence(metric)} is {quality}."


def findings(summary: dict[str, Any]) -> Iterator[str]:
    """What else to know, one sentence or two each, as measured: plain fine-tuning (also where it wins), groups, latency."""
    mine, metric = summary["promptintern"], main_metric(summary)
    if plain := summary.get("plain"):
        yield _against_plain(mine, plain, metric) + _paired(summary, "plain", metric)
        yield from _largest_gap(summary, metric)
    else:
        yield (
            "Plain fine-tuning was not evaluated (evaluate.baseline is off), so this page cannot say how much of the result "
            "comes from the prompt and how much from the rows."
        )
    yield from _taught(summary)
    yield from _forgotten(summary)
    full = summary["base_full_prompt"]
    if mine.get("latency_s") is not None and full.get("latency_cached_s") is not None:
        yield (
            f"A request takes {seconds(mine['latency_s'])}; with the full prompt it takes {seconds(full['latency_s'])}, "
            f"or {seconds(full['latency_cached_s'])} where the server caches the prompt's prefix."
        )


def _against_plain(mine: dict[str, Any], plain: dict[str, Any], metric: str) -> str:
    ours, theirs = value(metric, mine[metric]), value(metric, plain[metric])
    end = {
        "better": f"reaches {theirs}; PromptIntern's {ours} is better, and the 95% intervals do not overlap.",
        "worse": f"does better: {theirs} against {ours}. Use it instead of PromptIntern here.",
        "level": f"reaches {theirs} against {ours}: the 95% intervals overlap, so over all test rows no difference is shown.",
    }[standing(mine, plain, metric)]
    return f"Plain fine-tuning on the same rows, which never sees the prompt, {end}"


def _paired(summary: dict[str, Any], other: str, metric: str) -> str:
    """The paired test against another column on the same rows, which sees smaller differences than two intervals."""
    found = summary.get("paired", {}).get(other, {}).get(metric)
    if not found:
        return ""
    difference, low, high, p = found
    points = [v if metric == "bleu" else 100 * v for v in (difference, low, high)]
    return " Row by row: {:+.1f} points (95%: {:+.1f} to {:+.1f}), ".format(*points) + (f"p = {p:.3f}." if p >= 0.001 else "p < 0.001.")


def _taught(summary: dict[str, Any]) -> Iterator[str]:
    facts = summary.get("train", {}).get("promptintern", {})
    if facts.get("queries"):
        yield (
            f"A teacher with the full prompt before it answered {facts['answered']:,} of {facts['queries']:,} unlabelled queries; "
            f"the adapter also learned from the {facts['kept']:,} answers that it was sure of. Plain fine-tuning had as many updates, on the labelled rows alone."
        )


def _forgotten(summary: dict[str, Any]) -> Iterator[str]:
    mine, base = summary["promptintern"], summary.get("base", {})
    if "off_task_perplexity" in mine and "off_task_perplexity" in base:
        before, after = base["off_task_perplexity"], mine["off_task_perplexity"]
        yield f"On ordinary English text that belongs to no task the adapter's perplexity is {after:.1f}; the base model's is {before:.1f} ({after / before - 1:+.0%})."
    if "recited" in mine:
        words = "word" if mine["longest_run"] == 1 else "words"
        yield (
            f"Asked for its hidden template in seven ways, the adapter repeats {percent(mine['recited'])} of it (at most {mine['longest_run']:.0f} {words} in a row). "
            "That is no proof of secrecy: treat an adapter as being as confidential as its prompt."
        )


def _largest_gap(summary: dict[str, Any], metric: str) -> Iterator[str]:
    """The group where PromptIntern and plain fine-tuning differ most, if their intervals are apart there."""
    mine, plain = summary["promptintern"].get("groups", {}), summary["plain"].get("groups", {})
    shared = [g for g in mine if g in plain and metric in mine[g] and metric in plain[g]]
    apart = [g for g in shared if standing(mine[g], plain[g], metric) != "level"]
    if len(shared) > 1 and apart:
        group = max(apart, key=lambda g: abs(mine[g][metric] - plain[g][metric]))
        ours, theirs = value(metric, mine[group][metric]), value(metric, plain[group][metric])
        yield f"The two differ most in the group “{group}” ({mine[group]['rows']:,} rows): PromptIntern {ours}, plain fine-tuning {theirs}."


def caveats(summary: dict[str, Any]) -> Iterator[str]:
    """What the numbers do not show."""
    yield f"One training seed ({summary['seed']}): the intervals cover the choice of test rows, not the luck of training."
    if summary["test_rows"] < 200:
        yield f"Only {summary['test_rows']:,} test rows: differences of a few points cannot be seen."
    yield "The base model with the full prompt is not fine-tuned. A small base model makes that a low bar; plain fine-tuning is the opponent to look at."
    yield f"Latencies are medians of single requests on {summary.get('hardware') or 'one machine'}, not of a loaded server."
