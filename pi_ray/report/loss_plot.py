"""loss.png in the run directory: the loss of every update, phases as bands, dev losses at their ends. Drawn while training goes on, for those who look in."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from pi_ray.errors import StorageError
from pi_ray.report.charts import BANDS, COLOURS, GRID, INK, MUTED, Panel, nice, running_mean, thinned, ticks
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.train.train_log import entries

WIDTH, HEIGHT = 960, 420
SCALE = 3  # drawn so many times larger and then shrunk, which smooths every edge
PALE = "#a9d2c6"


def drawing(run: RunDir, watch: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """A listener of the training log that calls `watch` and draws the loss curve anew after each phase."""

    def seen(entry: dict[str, Any]) -> None:
        watch(entry)
        if entry.get("event") in ("phase_end", "best"):
            write(run)

    return seen


def write(run: RunDir) -> bool:
    """Draw what train.jsonl holds. False when it holds no update yet, or the disk takes no picture: training goes on without one."""
    log = list(entries(run.train_log.read_bytes())) if run.train_log.exists() else []
    updates = [e for e in log if isinstance(e.get("loss"), int | float)]
    if not updates:
        return False
    try:
        write_atomic(run.root / "loss.png", png(updates, [e for e in log if e.get("event") == "phase_end"], next((e["phase"] for e in log if e.get("event") == "best"), None)))
    except StorageError:
        return False
    return True


def png(updates: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]], best: int | None) -> bytes:
    """The picture. `updates` and `ends` are entries of the training log, `best` the phase whose adapter is the best one, if that is known."""
    from PIL import Image

    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "#ffffff")
    picture = _Picture(image)
    highest = max([u["loss"] for u in updates] + [e["dev_loss"] for e in ends])
    panel = Panel(56, 34, WIDTH - 76, HEIGHT - 84, (0, max(max(u["step"] for u in updates), 1)), (0, nice(highest)))
    phases = sorted({u["phase"] for u in updates})
    for i, phase in enumerate(phases):
        own = [(u["step"], u["loss"]) for u in updates if u["phase"] == phase]
        left, right = panel.px(own[0][0]), panel.px(updates_after(updates, phase, own[-1][0]))
        picture.band(left, panel.top, right, panel.top + panel.height, BANDS[i % 2])
        picture.text((left + right) / 2, 16, f"phase {phase}" + (" (best on dev rows)" if phase == best else ""), "mm", INK if phase == best else MUTED)
    for value in ticks(panel.y[1]):
        picture.line([(panel.left, panel.py(value)), (panel.left + panel.width, panel.py(value))], GRID, 1)
        picture.text(panel.left - 8, panel.py(value), f"{value:g}", "rm", MUTED)
    for value in ticks(panel.x[1], whole=True):
        picture.text(panel.px(value), panel.top + panel.height + 16, f"{value:,.0f}", "mm", MUTED)
    picture.text(4, 16, "loss", "lm", INK)
    picture.text(panel.left + panel.width, HEIGHT - 14, "updates", "rm", MUTED)
    for phase in phases:
        pixels = [(panel.px(x), panel.py(y)) for x, y in thinned([(u["step"], u["loss"]) for u in updates if u["phase"] == phase])]
        picture.line(pixels, PALE, 1)
        picture.line(running_mean(pixels), COLOURS["promptintern"], 2.2)
    for end in ends:
        picture.mark(panel.px(end["step"]), panel.py(end["dev_loss"]), f"dev {end['dev_loss']:.3f}")
    out = io.BytesIO()
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    return out.getvalue()


def updates_after(updates: Sequence[dict[str, Any]], phase: int, last: int) -> int:
    """Where a phase's band ends: at the first update of the next one."""
    return min((u["step"] for u in updates if u["phase"] > phase), default=last)


class _Picture:
    """Drawing in pixels of the final picture."""

    def __init__(self, image: Any):
        from PIL import ImageDraw, ImageFont

        self.draw = ImageDraw.Draw(image)
        self.font = ImageFont.load_default(13 * SCALE)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=round(width * SCALE), joint="curve")

    def band(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.draw.rectangle([left * SCALE, top * SCALE, max(left, right) * SCALE, bottom * SCALE], fill=colour)

    def text(self, x: float, y: float, text: str, anchor: str, colour: str) -> None:
        self.draw.text((x * SCALE, y * SCALE), text, fill=colour, font=self.font, anchor=anchor)

    def mark(self, x: float, y: float, text: str) -> None:
        corners = [(x, y - 7), (x + 7, y), (x, y + 7), (x - 7, y)]
        self.draw.polygon([(a * SCALE, b * SCALE) for a, b in corners], fill=INK, outline="#ffffff")
        self.draw.text(((x - 11) * SCALE, (y - 13) * SCALE), text, fill=INK, font=self.font, anchor="rm", stroke_width=3 * SCALE, stroke_fill="#ffffff")
