"""Charts as SVG text: training by phase, tokens of a request, quality with intervals.

They take the page's fonts, stay sharp in print and need no scripts. Every string from outside passes through `_text`,
which escapes it. Sizes are pixels of the viewBox; the page scales them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from statistics import fmean
from typing import Any

from pi_ray.metrics.names import metric_name
from pi_ray.report import summary as numbers
from pi_ray.schedule import Phase

# Okabe and Ito's palette: told apart by colour-blind readers; names are written beside the marks as well
COLOURS = {"base": "#7a7f87", "base_full_prompt": "#0072b2", "plain": "#c25400", "promptintern": "#00795a"}
INK, MUTED, GRID, BANDS = "#1d2329", "#5b646e", "#e3e7eb", ("#f3f5f8", "#ffffff")
WIDTH = 960
MAX_POINTS = 600  # of a curve; a longer log is averaged down to it
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A rectangle of the picture with linear scales: data x[0]..x[1], y[0]..y[1] (upwards)."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * self.width

    def py(self, y: float) -> float:
        return self.top + self.height - (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * self.height


@dataclass(frozen=True)
class PhaseSpan:
    """A phase on the axis of updates."""

    index: int
    phase: Phase
    rate: float  # achieved, of its template
    start: int
    end: int
    dev_loss: float | None  # at its end
    best: bool = False  # whether its adapter is the best one on dev rows


def training_chart(
    updates: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], spans: Sequence[PhaseSpan], alone: bool = False
) -> str:
    """Loss over updates, phases as bands and dev losses as marks; below it template rate and examples.

    `updates` and `plain` (the baseline's) are entries of training logs. `alone` makes the chart a file of its own.
    """
    last = max([s.end for s in spans] + [u["step"] for u in [*updates, *plain]], default=1)
    losses = [u["loss"] for u in [*updates, *plain]] + [s.dev_loss for s in spans if s.dev_loss is not None]
    most = max([1, *(s.phase.shots for s in spans)])
    loss = Panel(64, 26, WIDTH - 84, 250, (0, last), (0, round_up(max(losses, default=1.0))))
    rate = Panel(64, 322, WIDTH - 84, 62, (0, last), (0, 1))
    shots = Panel(64, 432, WIDTH - 84, 62, (0, last), (0, most))
    parts = []
    for panel in (loss, rate, shots):
        for i, (a, b) in enumerate((panel.px(s.start), panel.px(s.end)) for s in spans):
            parts.append(_rect(a, panel.top, b - a, panel.height, BANDS[i % 2]))
    for s in spans:
        name, middle = f"phase {s.index}{' (best on dev rows)' * s.best}", (loss.px(s.start) + loss.px(s.end)) / 2
        parts.append(_text(middle, loss.top - 9, name, "middle", INK if s.best else MUTED, bold=s.best))
    parts += [_scale(loss, ticks(loss.y[1]), "loss"), _scale(rate, [0, 0.5, 1], "template kept", "{:.0%}".format)]
    parts.append(_scale(shots, [0, most], "examples", "{:.0f}".format))
    parts += [_curve(loss, plain, COLOURS["plain"], "5 4"), _curve(loss, updates, COLOURS["promptintern"])]
    parts += [_dev_mark(loss, s) for s in spans if s.dev_loss is not None]
    for panel, steps in ((rate, [(s, s.rate) for s in spans]), (shots, [(s, s.phase.shots) for s in spans])):
        stairs = [(panel.px(x), panel.py(value)) for s, value in steps for x in (s.start, s.end)]
        parts.append(_line(stairs, COLOURS["promptintern"], 2.5))
    bottom = shots.top + shots.height
    parts += [_text(shots.px(t), bottom + 18, f"{t:,.0f}", "middle", MUTED) for t in ticks(last, whole=True)]
    parts.append(_text(shots.left + shots.width, bottom + 38, "updates", "end", MUTED))
    names = [("loss" if alone else "PromptIntern", COLOURS["promptintern"], "")]
    names += [("plain fine-tuning", COLOURS["plain"], "5 4")] if plain else []
    parts.append(_legend(loss, names, dev=any(s.dev_loss is not None for s in spans)))
    title = "Training loss by phase, with the share of the template and the number of examples"
    return _svg(540, title, parts, "background:#fff;font:13px sans-serif" if alone else "")


def tokens_chart(summary: dict[str, Any]) -> str:
    """One bar for each column: input tokens of a request, the prefix that all requests share in a lighter colour."""
    found = numbers.summary_columns(summary)
    most = max(c["input_tokens"] for c in found.values()) or 1
    panel = Panel(190, 8, WIDTH - 190 - 190, 34 * len(found), (0, most), (0, 1))
    parts = []
    for i, (name, column) in enumerate(found.items()):
        top, prefix = panel.top + 34 * i, min(column["prefix_tokens"], column["input_tokens"])
        middle, end = panel.px(prefix), panel.px(column["input_tokens"])
        label = numbers.column_label(name, column)
        parts.append(_text(panel.left - 12, top + 19, label, "end", INK, bold=name == "promptintern"))
        parts.append(_rect(panel.left, top + 4, middle - panel.left, 22, _colour(name), opacity=0.45))
        parts.append(_rect(middle, top + 4, max(end - middle, 1.5), 22, _colour(name)))
        note = f"{column['input_tokens']:,.0f} tokens ({prefix:,.0f} shared)"
        parts.append(_text(end + 10, top + 19, note, "start", INK))
    return _svg(panel.top + panel.height + 4, "Input tokens per request", parts)


def quality_chart(summary: dict[str, Any], metric: str) -> str:
    """A dot with its 95% interval for each column, for all test rows and for each group of them (the first six)."""
    found = numbers.summary_columns(summary)
    blocks = [("All test rows", summary["test_rows"], found)]
    for group, rows in islice(numbers.groups_of(summary).items(), 6):
        own = {n: c.get("groups", {}).get(group, {}) for n, c in found.items()}
        blocks.append((group or "Other rows", rows, own))
    step, gap = 24, 42
    top_value = 100 if metric == "bleu" else 1
    height = len(blocks) * (gap + step * len(found))
    panel = Panel(190, 6, WIDTH - 190 - 210, height, (0, top_value), (0, 1))
    quarters = [top_value * i / 4 for i in range(5)]
    marks = [(panel.px(value), numbers.format_metric(metric, value)) for value in quarters]
    parts = [_rule(x, panel.top + 8, x, height) for x, _ in marks]
    parts += [_text(x, height + 20, name, "middle", MUTED) for x, name in marks]
    y = panel.top
    for title, rows, block in blocks:
        parts.append(_text(4, y + 20, f"{title} ({rows:,})", "start", INK, bold=True))
        y += gap
        for name, column in block.items():
            label = numbers.column_label(name, found[name])
            parts.append(_text(panel.left - 12, y + 4, label, "end", INK, bold=name == "promptintern"))
            parts += _dot(panel, y, _colour(name), column, metric)
            y += step
    return _svg(height + 30, f"{metric_name(metric)} with 95% intervals", parts)


def _dot(panel: Panel, y: float, colour: str, column: dict[str, Any], metric: str) -> Iterator[str]:
    value = column.get(metric)
    if value is None:
        yield _text(panel.left + 6, y + 4, "not measured", "start", MUTED)
        return
    low, high = numbers.metric_interval(column, metric)
    yield _line([(panel.px(low), y), (panel.px(high), y)], colour, 2.5)
    for bound in {low, high}:
        yield _rule(panel.px(bound), y - 5, panel.px(bound), y + 5, colour)
    yield f'<circle cx="{panel.px(value):.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"/>'
    bounds = f"  ({numbers.format_metric(metric, low)} to {numbers.format_metric(metric, high)})" if low != high else ""
    note = numbers.format_metric(metric, value, 1) + bounds
    yield _text(panel.left + panel.width + 22, y + 4, note, "start", INK)


def _curve(panel: Panel, updates: Sequence[dict[str, Any]], colour: str, dashes: str = "") -> str:
    """The raw losses thin and pale (none where dashed), their running mean on top."""
    parts = []
    for phase in sorted({u["phase"] for u in updates}):  # no mean over two phases, whose prompts differ
        points = thinned([(u["step"], u["loss"]) for u in updates if u["phase"] == phase])
        pixels = [(panel.px(x), panel.py(y)) for x, y in points]
        parts.append("" if dashes else _line(pixels, colour, 1, opacity=0.35))
        width = max(1, len(pixels) // 16)  # the mean is of so many points to either side
        windows = [pixels[max(0, i - width) : i + width + 1] for i in range(len(pixels))]
        means = [(x, fmean(y for _, y in window)) for (x, _), window in zip(pixels, windows, strict=True)]
        parts.append(_line(means, colour, 2.2, dashes))
    return "".join(parts)


def thinned(points: Points) -> Points:
    """At most MAX_POINTS, each the mean of as many neighbours."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in b), fmean(y for _, y in b)) for b in buckets]


def _dev_mark(panel: Panel, span: PhaseSpan) -> str:
    x, y = panel.px(span.end), panel.py(span.dev_loss or 0)
    diamond = f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z" fill="{INK}" stroke="#fff" stroke-width="1.5"/>'
    return diamond + _text(x - 11, y - 11, f"{span.dev_loss:.3f}", "end", INK, bold=True, halo=True)


def _scale(panel: Panel, ticks: Sequence[float], title: str, write: Callable[[float], str] = "{:g}".format) -> str:
    parts = [_rule(panel.left, panel.py(t), panel.left + panel.width, panel.py(t)) for t in ticks]
    parts += [_text(panel.left - 8, panel.py(t) + 4, write(t), "end", MUTED) for t in ticks]
    return "".join([*parts, _text(4, panel.top - 14, title, "start", INK, bold=True)])


def _legend(panel: Panel, names: Sequence[tuple[str, str, str]], dev: bool) -> str:
    x, y, parts = panel.left + panel.width - 180, panel.top + 20, []
    for name, colour, dashes in names:
        parts += [_line([(x, y - 4), (x + 26, y - 4)], colour, 2.5, dashes), _text(x + 34, y, name, "start", INK)]
        y += 20
    if dev:
        parts.append(f'<path d="M{x + 13} {y - 11}l7 7l-7 7l-7 -7z" fill="{INK}"/>')
        parts.append(_text(x + 34, y, "dev loss, phase end", "start", INK))
    return "".join(parts)


def _colour(name: str) -> str:
    return COLOURS.get(name, "#8a5a99")


def round_up(high: float) -> float:
    """The next round number from `high` on."""
    unit = 10 ** math.floor(math.log10(high)) if high > 0 else 1
    return next(unit * m for m in (1, 1.5, 2, 3, 4, 5, 8, 10) if unit * m >= high * 0.9999)


def ticks(high: float, whole: bool = False) -> list[float]:
    """About five round numbers from 0 to `high`."""
    unit = round_up(high / 5)
    unit = max(1, round(unit)) if whole else unit
    return [i * unit for i in range(int(high / unit + 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, colour: str, bold: bool = False, halo: bool = False) -> str:
    weight = ' font-weight="600"' * bold + ' stroke="#fff" stroke-width="4" paint-order="stroke"' * halo
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect {size} fill="{colour}" fill-opacity="{opacity}"/>'


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str = GRID) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _line(points: Points, colour: str, width: float, dashes: str = "", opacity: float = 1) -> str:
    if not points:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    stroke = f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"'
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" {stroke}{dash}/>'


def _svg(height: float, title: str, parts: Iterable[str], style: str = "") -> str:
    """`style` is for a file of its own, which must also name the language, and for which no page sets fonts."""
    own = f' xmlns="http://www.w3.org/2000/svg" style="{style}"' if style else ""
    size = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    return f'<svg {size}{own} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
