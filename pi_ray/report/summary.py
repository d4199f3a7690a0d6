"""The numbers of eval/summary.json as people read them: tables, who is better, and the sentences to take away.

A column is one way of answering (base model, full prompt, plain fine-tuning, PromptIntern). PromptIntern differs from
another column where the 95% interval of their difference, row by row, leaves out 0. Groups of rows, and summaries
without that interval, are called different where their own intervals do not overlap, which is stricter.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from pi_ray.evaluate.columns import LABELS
from pi_ray.metrics.names import metric_in_sentence, metric_name
from pi_ray.report.judge import judge_sentences
from pi_ray.report.reference import answered_sentence, is_own_teacher, name_teacher, teacher_caveats
from pi_ray.run.answered import reference_teacher
from pi_ray.schedule import Phase

WRITERS = {  # of queries
    "adapter": "an adapter of the base model, trained on the labelled rows, wrote them",
    "prompt": "the base model wrote them", "few-shot": "the base model wrote them",
    "endpoint": "a service's model wrote them",
}
WEAK = 0.1  # a metric below this in every column tells them apart badly


def summary_columns(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> column, in the order of the tables; a name that LABELS lacks comes before PromptIntern."""
    found = {k: v for k, v in summary.items() if isinstance(v, dict) and "input_tokens" in v}
    order = list(dict.fromkeys(k for k in (*LABELS, *found) if k != "promptintern"))
    return {k: found[k] for k in (*order, "promptintern") if k in found}


def column_label(name: str, column: dict[str, Any]) -> str:
    return column.get("label") or LABELS.get(name, name)


def metrics_of(summary: dict[str, Any]) -> list[str]:
    """Metrics of the tables: those of task.metric, else exact match, BLEU, then the task's own with an interval."""
    if named := summary.get("metrics"):
        return named
    own = {m for c in summary_columns(summary).values() for m in c.get("intervals", {})}
    return ["exact_match", "bleu", *sorted(own - {"exact_match", "bleu"})]


def main_metric(summary: dict[str, Any]) -> str:
    """The metric of headlines and verdicts: the first of task.metric, whatever it says.

    Without it exact match, else the task's own, else BLEU, skipping those near 0.
    """
    if named := summary.get("metrics"):
        return named[0]
    exact, bleu, *own = metrics_of(summary)
    found = summary_columns(summary).values()
    return next((m for m in (exact, *own) if any(c.get(m, 0) >= WEAK for c in found)), bleu)


def metric_interval(column: dict[str, Any], metric: str) -> tuple[float, float]:
    """The 95% interval; the value itself twice where none was computed."""
    low, high = column.get("intervals", {}).get(metric) or (column[metric], column[metric])
    return low, high


def compare_intervals(one: dict[str, Any], other: dict[str, Any], metric: str) -> str:
    """How `one` compares to `other`: "better" or "worse" where the 95% intervals are apart, else "level"."""
    (low, high), (other_low, other_high) = metric_interval(one, metric), metric_interval(other, metric)
    return "better" if low > other_high else "worse" if high < other_low else "level"


def compare_to(summary: dict[str, Any], name: str, metric: str) -> str:
    """How PromptIntern compares to another column: "better", "worse" or "level"."""
    if found := summary.get("paired", {}).get(name, {}).get(metric):
        _, low, high, _ = found
        return "better" if low > 0 else "worse" if high < 0 else "level"
    return compare_intervals(summary["promptintern"], summary[name], metric)


def format_percent(share: float) -> str:
    """Whole percents; a decimal where rounding would claim all or nothing (99.6% is not 100%)."""
    text = f"{share:.0%}"
    return f"{share:.1%}" if (text in ("100%", "0%") and share not in (0, 1)) else text


def format_metric(metric: str, number: float, digits: int = 0) -> str:
    """A metric as people write it: BLEU on its scale of 100, everything else in percent."""
    if metric == "bleu":
        return f"{number:.1f}"
    return f"{number:.{digits}%}" if digits else format_percent(number)


def format_seconds(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number * 1000:.0f} ms" if number < 0.9995 else f"{number:.2f} s"


def token_reduction(summary: dict[str, Any], column: dict[str, Any]) -> float:
    """Share of the full prompt's input tokens that `column` does not send; negative where it sends more."""
    full = summary["base_full_prompt"]["input_tokens"]
    return 1 - column["input_tokens"] / full if full else 0.0


class Line(NamedTuple):
    """One line of a table: a name and, for each column, a cell and a small note (such as its interval)."""

    name: str
    cells: list[tuple[str, str]]
    rows: int = 0  # the number of a group's test rows, 0 in the main table


def table_lines(summary: dict[str, Any]) -> list[Line]:
    """The main table, used for the terminal and the page."""
    found = summary_columns(summary)
    columns = found.values()
    lines = [Line(metric_name(m), [_measured(c, m) for c in columns]) for m in metrics_of(summary)]

    def add(name: str, key: str, write: Callable[[Any], str], note: str = "", where_measured: bool = False) -> None:
        if where_measured and not any(key in c for c in columns):
            return
        lines.append(Line(name, [(write(c[key]), note) if c.get(key) is not None else ("–", "") for c in columns]))

    add("Input tokens per request", "input_tokens", "{:,.0f}".format)
    fewer = {n: format_percent(token_reduction(summary, c)) for n, c in found.items()} | {"base_full_prompt": "–"}
    lines.append(Line("Fewer than the full prompt", [(fewer[n], "") for n in found]))
    add("Output tokens per request", "output_tokens", "{:,.0f}".format)
    if any(c.get("cut_off") for c in columns):
        add("Answers cut off", "cut_off", "{:.1%}".format, f"at {summary['max_new_tokens']} tokens")
    add("Latency, no prefix cache", "latency_s", format_seconds)
    add("Latency, prefix cached", "latency_cached_s", format_seconds)
    add("Latency, adapter merged", "latency_merged_s", format_seconds, where_measured=True)
    add("Perplexity on other text", "off_task_perplexity", "{:.1f}".format, where_measured=True)
    add("Template recited when asked", "recited", "{:.0%}".format, where_measured=True)
    add("Longest run of its words", "longest_run", "{:.0f}".format, where_measured=True)
    return lines


def _measured(column: dict[str, Any], metric: str) -> tuple[str, str]:
    if column.get(metric) is None:
        return "–", ""
    low, high = metric_interval(column, metric)
    note = f"{format_metric(metric, low, 1)} to {format_metric(metric, high, 1)}"
    return format_metric(metric, column[metric], 1), "" if low == high else note


def groups_of(summary: dict[str, Any]) -> dict[str, int]:
    """Group -> its test rows; "" has the other rows. Empty where the task names no groups."""
    groups = summary.get("groups", {})
    return {} if groups.keys() == {""} else groups


def group_lines(summary: dict[str, Any], metric: str) -> list[Line]:
    """`metric` for each group of test rows and column."""
    columns = summary_columns(summary).values()
    return [
        Line(group, [_measured(c.get("groups", {}).get(group, {}), metric) for c in columns], rows)
        for group, rows in groups_of(summary).items()
    ]


def summary_table(summary: dict[str, Any]) -> Table:
    def stacked(cell: tuple[str, str]) -> Text:
        return Text.assemble(cell[0], "\n", (cell[1], "not bold dim")) if cell[1] else Text(cell[0])

    found, metric = summary_columns(summary), main_metric(summary)
    rows = [[Text(line.name), *map(stacked, line.cells)] for line in table_lines(summary)]
    for line in group_lines(summary, metric):
        name = f"{metric_name(metric)}: {line.name or 'other rows'} ({line.rows:,})"
        rows.append([Text(name), *map(stacked, line.cells)])
    title = f"{summary['run']}: {summary['test_rows']:,} test rows, 95% intervals"
    if reference_teacher(summary):
        title += "; agreement with the teacher's answers, not truth"
    mine = [*found].index("promptintern") + 1 if "promptintern" in found else 0
    return terminal_table(title, ["", *(column_label(n, c) for n, c in found.items())], rows, mine)


def terminal_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str | Text]], bold: int = 0) -> Table:
    """Names on the left, numbers on the right, no markup read in any text; column `bold`, unless 0, is set in bold."""
    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="right" if i else "left", style="bold" if 0 < i == bold else "")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def headline(summary: dict[str, Any], last: Phase) -> str:
    """The result in two plain sentences; `last` is the phase whose prompt inference sends, unless a floor chose one.

    The floor's verdict comes first.
    """
    mine, full, metric = summary["promptintern"], summary["base_full_prompt"], main_metric(summary)
    verdict, rate, shots = "", last.rate, last.shots
    if floor := summary.get("floor"):
        chosen = floor["phases"][floor["chosen"]]
        verdict, rate, shots = f"{floor['sentence']} ", chosen["rate"], chosen["shots"]
    sends = "the query alone" if not rate and not shots else "the whole prompt" if rate == 1 else "a shortened prompt"
    fewer = token_reduction(summary, mine)
    tokens = f"{mine['input_tokens']:,.0f} input tokens instead of {full['input_tokens']:,.0f}"
    saving = f"{tokens} ({format_percent(fewer)} fewer)" if fewer > 0 else f"{tokens}, which saves nothing"
    compared = compare_to(summary, "base_full_prompt", metric)
    link = {"better": "against", "worse": "below", "level": "level with"}[compared]
    ours, theirs = (format_metric(metric, c[metric]) for c in (mine, full))
    if facts := reference_teacher(summary):
        name = metric_in_sentence(metric)
        agrees = f"On held-out queries its {name} with the answers of {name_teacher(facts)} is {ours}"
        before = "" if is_own_teacher(summary) else f", {link} {theirs} for the base model with the full prompt"
        return f"The adapter answers with {sends}: {saving}. {agrees}{before}."
    quality = f"{metric_in_sentence(metric)} is {ours}, {link} {theirs} for the base model with the full prompt"
    return f"{verdict}The adapter answers with {sends}: {saving}. Its {quality}."


def findings(summary: dict[str, Any]) -> Iterator[str]:
    """Further results, one sentence or two each: plain fine-tuning (also where it wins), groups, latency."""
    mine, full, metric = summary["promptintern"], summary["base_full_prompt"], main_metric(summary)
    if answered := summary.get("answered"):
        yield answered_sentence(answered)
    if "plain" in summary:
        yield from _plain_sentences(summary, mine, metric)
    elif not answered:
        unknown = "how much of the result comes from the prompt and how much from the rows"
        yield f"Plain fine-tuning was not evaluated (evaluate.baseline is off), so this page cannot say {unknown}."
    facts = summary.get("train", {}).get("promptintern", {})
    if facts.get("queries"):
        answered = f"answered {facts['answered']:,} of {facts['queries']:,} unlabelled queries"
        views = f" that it gave in each of {facts['views']} orders of the prompt" if facts.get("views", 1) > 1 else ""
        learned = f"the adapter also learned from the {facts['kept']:,} answers{views or ' that it was sure of'}"
        plain = " Plain fine-tuning had as many updates, on the labelled rows alone." * ("plain" in summary)
        yield f"A teacher with the full prompt before it {answered}; {learned}.{plain}"
    if facts.get("generated"):
        yield f"{facts['generated']:,} of these queries were generated from the template: {WRITERS[facts['writer']]}."
    if facts.get("options"):
        yield f"How it learned from the teacher: {'; '.join(facts['options'])}."
    if facts.get("student_tokens"):
        replaced = format_percent(facts["student_replaced"] / facts["student_tokens"])
        written = f"The student wrote {facts['student_answers']:,} answers itself in the last updates"
        yield f"{written}; the teacher replaced {replaced} of their tokens."
    if facts.get("facts"):
        yield f"Reading drills in the first phase exchanged {'; '.join(facts['facts'])}."
    yield from judge_sentences(mine)
    yield from _probe_sentences(mine, summary.get("base", {}))
    if mine.get("latency_s") is not None and full.get("latency_cached_s") is not None:
        took, uncached, cached = map(format_seconds, (mine["latency_s"], full["latency_s"], full["latency_cached_s"]))
        both = f"with the full prompt it takes {uncached}, or {cached} where the server caches the prompt's prefix"
        yield f"A request takes {took}; {both}."


def _plain_sentences(summary: dict[str, Any], mine: dict[str, Any], metric: str) -> Iterator[str]:
    """All rows, with the paired test, and the most unlike group."""
    plain = summary["plain"]
    ours, theirs = format_metric(metric, mine[metric]), format_metric(metric, plain[metric])
    end = {
        "better": f"reaches {theirs}; PromptIntern's {ours} is better.",
        "worse": f"does better: {theirs} against {ours}. Use it instead of PromptIntern here.",
        "level": f"reaches {theirs} against {ours}: over all test rows no difference is shown.",
    }[compare_to(summary, "plain", metric)]
    if found := summary.get("paired", {}).get("plain", {}).get(metric):
        difference, low, high = (v if metric == "bleu" else 100 * v for v in found[:3])
        p = f"= {found[3]:.3f}" if found[3] >= 0.001 else "< 0.001"
        end += f" Row by row: {difference:+.1f} points (95%: {low:+.1f} to {high:+.1f}), p {p}."
    yield f"Plain fine-tuning on the same rows, which never sees the prompt, {end}"
    own, other = mine.get("groups", {}), plain.get("groups", {})
    shared = [g for g in own if g in other and metric in own[g] and metric in other[g]]
    apart = [g for g in shared if compare_intervals(own[g], other[g], metric) != "level"]
    if len(shared) > 1 and apart:
        group = max(apart, key=lambda g: abs(own[g][metric] - other[g][metric]))
        ours, theirs = format_metric(metric, own[group][metric]), format_metric(metric, other[group][metric])
        where = f"“{group}” ({own[group]['rows']:,} rows)"
        yield f"The two differ most in the group {where}: PromptIntern {ours}, plain fine-tuning {theirs}."


def _probe_sentences(mine: dict[str, Any], base: dict[str, Any]) -> Iterator[str]:
    if "off_task_perplexity" in mine and "off_task_perplexity" in base:
        before, after = base["off_task_perplexity"], mine["off_task_perplexity"]
        text = f"On ordinary English text that belongs to no task the adapter's perplexity is {after:.1f}"
        yield f"{text}; the base model's is {before:.1f} ({after / before - 1:+.0%})."
    if "recited" in mine:
        longest = f"at most {mine['longest_run']:.0f} word{'s' * (mine['longest_run'] != 1)} in a row"
        repeats = f"the adapter repeats {format_percent(mine['recited'])} of it ({longest})"
        secret = "That is no proof of secrecy: treat an adapter as being as confidential as its prompt."
        yield f"Asked for its hidden template in seven ways, {repeats}. {secret}"


def caveats(summary: dict[str, Any]) -> Iterator[str]:
    """The limits of the numbers, one sentence each."""
    if facts := reference_teacher(summary):
        yield from teacher_caveats(facts, summary["split"])
    yield f"One training seed ({summary['seed']}): intervals cover the choice of test rows, not the luck of training."
    if summary["test_rows"] < 200:
        yield f"Only {summary['test_rows']:,} test rows: differences of a few points cannot be seen."
    bar = "A small base model makes that a low bar; plain fine-tuning is the opponent to look at."
    yield f"The base model with the full prompt is not fine-tuned. {bar}"
    where = summary.get("hardware") or "one machine"
    yield f"Latencies are medians of single requests on {where}, not of a loaded server."
