"""loss.svg in the run directory: the report's training chart, drawn anew after each phase while training goes on."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.errors import StorageError
from pi_ray.report.charts import PhaseSpan, training_chart
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train.train_log import read_entries

Listener = Callable[[dict[str, Any]], None]


def draw_after_phases(config: RunConfig, watch: Listener) -> Listener:
    """A listener of the training log that calls `watch` and draws the loss after each phase."""
    def listen(entry: dict[str, Any]) -> None:
        watch(entry)
        if entry.get("event") in ("phase_end", "best"):
            write_loss_plot(config)

    return listen


def write_loss_plot(config: RunConfig) -> None:
    """Draw the run's losses, if there are any. A disk that does not take the file is no error: training goes on."""
    run = RunDir(config.root)
    if updates := read_updates(run.train_log):
        with suppress(StorageError):
            picture = training_chart(updates, [], phase_spans(config, updates), alone=True)
            write_atomic(run.root / "loss.svg", picture)


def read_updates(log: Path) -> list[dict[str, Any]]:
    """One entry for each update, the last where a restart repeated it. Losses that are no number are left out."""
    entries = ((e, e.get("loss")) for e in read_log(log))
    by_step = {e["step"]: e for e, loss in entries if isinstance(loss, int | float) and math.isfinite(loss)}
    return [by_step[step] for step in sorted(by_step)]


def phase_spans(config: RunConfig, updates: Sequence[dict[str, Any]]) -> list[PhaseSpan]:
    """The phases on the axis of updates; one without an update is left out."""
    run = RunDir(config.root)
    log = list(read_log(run.train_log))
    dev_losses = {e["phase"]: e.get("dev_loss") for e in log if e.get("event") == "phase_end"}
    best = [e["phase"] for e in log if e.get("event") == "best"][-1:]
    achieved = {t["rate"]: t["achieved"] for t in read_template_entries(run)}
    spans: list[PhaseSpan] = []
    for i, phase in enumerate(plan_phases(config.schedule)):
        steps = [u["step"] for u in updates if u["phase"] == i]
        if steps:
            start, rate = spans[-1].end if spans else min(steps), achieved.get(phase.rate, phase.rate)
            spans.append(PhaseSpan(i, phase, rate, start, max(steps), dev_losses.get(i), i in best))
    return spans


def read_template_entries(run: RunDir) -> list[dict[str, Any]]:
    """templates.json: rate, achieved rate, tokens and text of each template; empty before preparation."""
    path = run.templates / "templates.json"
    return json.loads(path.read_bytes()) if path.is_file() else []


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl file that can be read: a killed run may have left half of one."""
    return read_entries(path.read_bytes()) if path.is_file() else iter(())
