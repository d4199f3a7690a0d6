"""Progress for people: a live bar on a terminal, elsewhere a plain line every ten seconds, which logs keep."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

EVERY_S = 10.0
STEPS = ("Ask", "Answer", "Prepare", "Train", "Evaluate", "Report", "Published")  # first words of a step's first line
LINE = re.compile(r"\s*(?P<title>\S.*): (?P<done>\d+)/(?P<total>\d+)  (?P<text>.*)")


class ProgressLine:
    """`with ProgressLine(console, "training", total) as shown: shown.update(done, "loss 0.31")`."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total = console, title, total
        self.shown = -EVERY_S
        self.recent: deque[tuple[float, int]] = deque(maxlen=10)  # (seconds, done): time left follows the present speed
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[text]}", TimeElapsedColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> ProgressLine:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, text: str = "", left: float | None = None) -> None:
        """Show `done` of `total`. `left`: seconds to go, where the caller has a better estimate."""
        now = time.monotonic()
        self.recent.append((now, done))
        start, done_then = self.recent[0]
        if left is None and done > done_then:
            left = (now - start) * (self.total - done) / (done - done_then)
        if left is not None:
            text += f"  {left:.0f} s left" if left < 120 else f"  {left / 60:.0f} min left"
        if self.bar:
            self.bar.update(self.task, completed=done, total=self.total, text=text)
        elif now - self.shown >= EVERY_S or done >= self.total:
            self.shown = now
            self.console.print(progress_line(self.title, done, self.total, text), highlight=False)


def progress_line(title: str, done: int, total: int, text: str) -> str:
    """The line that is printed where there is no live bar; `LogProgress` reads it again from a job's log."""
    return f"{title}: {done}/{total}  {text}"


class LogProgress:
    """Where a run stands, read from its log: `step`, and `progress` within the step. str() gives both in one line."""

    def __init__(self) -> None:
        self.step = self.progress = ""

    def read_line(self, line: str) -> bool:
        """Read one line of the log. Returns True for a progress line, which the next one outdates."""
        if line.startswith(tuple(f"{step}  " for step in STEPS)):
            self.step, self.progress = line.split(maxsplit=1)[0].lower(), ""
        if found := LINE.fullmatch(line):
            self.progress = f"{found['title']} {found['done']}/{found['total']}  {found['text']}".rstrip()
        return bool(found)

    def __str__(self) -> str:
        return "  ".join(filter(None, (self.step, self.progress)))


def training_listener(shown: ProgressLine, costs: Sequence[float]) -> Callable[[dict[str, Any]], None]:
    """A listener of the training log that shows it as it grows; `costs[i]` is the work of update i, in any unit."""
    remaining = [0.0, *accumulate(reversed(costs))][::-1]  # remaining[i]: the work of update i and all later ones
    recent: deque[tuple[float, float]] = deque(maxlen=10)
    taught: list[tuple[str, int, float]] = []  # (verb, rows, when) of the teacher, since it began with this verb

    def updates_left(done: int) -> float:
        return remaining[done] * sum(s for _, s in recent) / sum(c for c, _ in recent) if recent else 0.0

    def teaching_left(verb: str, done: int, total: int) -> float:
        if taught and (taught[-1][0] != verb or done < taught[-1][1]):
            taught.clear()
        taught.append((verb, done, time.monotonic()))
        _, first, began = taught[0]
        return (total - done) * (taught[-1][2] - began) / (done - first) if done > first else 0.0

    def listen(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            done = entry["step"] + 1
            recent.append((costs[entry["step"]], entry["seconds"]))
            left = updates_left(done)
            speed = f"{entry['tokens'] / entry['seconds']:.0f} tokens/s"
            saved = 1 - entry["tokens"] / entry["plain_tokens"]  # by rows of a batch that share their prefix
            if saved >= 0.005:
                speed += f", {saved:.0%} saved by sharing"
            shown.update(done, f"phase {entry['phase']}  loss {entry['loss']:.3f}  {speed}", left)
        elif entry.get("event") == "teacher":
            text = f"the teacher has {entry['verb']} {entry['done']} of {entry['total']} rows"
            left = updates_left(entry["step"]) + teaching_left(entry["verb"], entry["done"], entry["total"])
            shown.update(entry["step"], text, left or None)
        elif text := _event_text(entry):
            shown.console.print(f"{shown.title}: {text}", highlight=False)

    return listen


def _event_text(entry: dict[str, Any]) -> str:
    """An event of the training log in words; "" for one that is not shown."""
    step, dev_loss = entry.get("step", 0), f"dev loss {entry.get('dev_loss', 0):.3f}"
    match entry.get("event"):
        case "workers":
            return f"{entry['workers']} training worker{'s' * (entry['workers'] > 1)}, from update {entry['step']} on"
        case "dev":
            return f"update {step + 1}, {dev_loss}, dev accuracy {entry['dev_accuracy']:.1%}{_dev_scores(entry)}"
        case "phase_end":
            early, best_step = " early, no more gain" if entry.get("early") else "", entry.get("best_step", step)
            best = f", as it was after update {best_step + 1}" if best_step != step else ""
            return f"phase {entry['phase']} done{early}, {dev_loss}; adapter written{best}{_dev_scores(entry)}"
        case "best" if "floor" in entry:
            return entry["floor"]["sentence"]
        case "best":
            right = f"{entry['dev_accuracy']:.1%} of their tokens right"
            if "metric" in entry:
                right = f"{entry['metric'].replace('_', ' ')} {entry['score']:.1%}, {right}"
            return f"the best adapter on dev rows is that of phase {entry['phase']} ({right})"
        case "teacher_answers" if not entry["queries"]:
            mean = f", averaged over {entry['views']} orders of the prompt" if entry["views"] > 1 else ""
            noted = f"the teacher's likeliest tokens are noted for every answer{mean}"
            return "; ".join([noted, *entry.get("options", ())])
        case "teacher_answers":
            answered = f"{entry['answered']} of {entry['queries']} unlabelled queries"
            views = f"; it read the prompt in {entry['views']} orders" if entry["views"] > 1 else ""
            held = f"; {entry['held_out']} others are held out, to ask what it knows" if entry.get("held_out") else ""
            learned = f"{entry['kept']} of them surely enough to learn from{views}{held}"
            return "; ".join([f"the teacher answered {answered}, {learned}", *entry.get("options", ())])
        case "student_answers":
            mended = f"{entry['replaced']} of their {entry['tokens']} tokens"
            far = f"both were {entry['divergence']:.3f} bits apart at each token"
            return f"the student answered {entry['answers']} queries, the teacher replaced {mended}; {far}"
        case "drills":
            return f"reading drills in the first phase: {'; '.join(entry['facts'])}"
        case "suffix_batches":
            return f"rows go on from their prefix's cache, which is computed once a batch, since {entry['reason']}"
        case "plain_batches":
            return f"plain batches, since {entry['reason']}"
        case "warning":
            return f"warning: {entry['text']}"
    return ""


def _dev_scores(entry: dict[str, Any]) -> str:
    """The scores of answers to dev rows at the end of a line, where there are any."""
    scores = [f"{name.replace('_', ' ')} {mean:.1%}" for name, mean in entry.get("scores", {}).items()]
    return f"; its answers to dev rows: {', '.join(scores)}" if scores else ""


def format_money(amount: float, currency: str) -> str:
    """An amount with cents, or with three significant digits where it is below one."""
    if amount == 0:
        return f"{currency} 0"
    digits = max(2, 2 - math.floor(math.log10(abs(amount))))
    return f"{currency} {amount:,.{digits}f}"
