"""What a person watches: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY_S = 10.0
STEPS = ("Prepare", "Train", "Evaluate", "Report", "Published")  # how the lines begin that say what a run is doing
LINE = re.compile(r"\s*(?P<title>\S.*): (?P<done>\d+)/(?P<total>\d+)  (?P<text>.*)")


class Watch:
    """`with Watch(console, "training", total) as watch: watch.to(done, "loss 0.31")`."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total = console, title, total
        self.shown = -EVERY_S
        self.recent: deque[tuple[float, int]] = deque(maxlen=10)  # (seconds, done): time left follows the present speed
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> Watch:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def to(self, done: int, text: str = "", left: float | None = None) -> None:
        """Progress stands at `done` of `total`; `left` in seconds, where the caller knows better than the present speed."""
        now = time.monotonic()
        self.recent.append((now, done))
        text += self._left(left)
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
        elif now - self.shown >= EVERY_S or done >= self.total:
            self.shown = now
            self.console.print(line(self.title, done, self.total, text), highlight=False)

    def _left(self, seconds: float | None) -> str:
        (then, before), (now, done) = self.recent[0], self.recent[-1]
        if seconds is None and done > before:
            seconds = (now - then) * (self.total - done) / (done - before)
        return "" if seconds is None else f"  {seconds:.0f} s left" if seconds < 120 else f"  {seconds / 60:.0f} min left"


def line(title: str, done: int, total: int, text: str) -> str:
    """What is printed where there is no live bar. `Seen` reads it again from the log of a job."""
    return f"{title}: {done}/{total}  {text}"


class Seen:
    """What the log of a run says of where it stands, in one line: `step`, and `at` within it."""

    def __init__(self) -> None:
        self.step = self.at = ""

    def take(self, line: str) -> bool:
        """Read one line of the log; True when it is progress, which the next one outdates."""
        if line.startswith(tuple(f"{step}  " for step in STEPS)):
            self.step, self.at = line.split(maxsplit=1)[0].lower(), ""
        found = LINE.fullmatch(line)
        if found:
            self.at = f"{found['title']} {found['done']}/{found['total']}  {found['text']}".rstrip()
        return bool(found)

    def __str__(self) -> str:
        return "  ".join(filter(None, (self.step, self.at)))


def training(watch: Watch, costs: Sequence[float]) -> Callable[[dict[str, Any]], None]:
    """A listener for the training log: phase, update, loss, tokens/s, time left. `costs[i]` is the work of update i, in any unit."""
    ahead = [0.0, *accumulate(reversed(costs))][::-1]  # ahead[i]: the work of update i and all after it
    recent: deque[tuple[float, float]] = deque(maxlen=10)

    def listen(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            done = entry["step"] + 1
            recent.append((costs[entry["step"]], entry["seconds"]))
            left = ahead[done] * sum(s for _, s in recent) / sum(c for c, _ in recent)
            watch.to(done, f"phase {entry['phase']}  loss {entry['loss']:.3f}  {entry['tokens'] / entry['seconds']:.0f} tokens/s{_saved(entry)}", left)
        elif said := _event(entry):
            watch.console.print(f"{watch.title}: {said}", highlight=False)

    return listen


def _saved(entry: dict[str, Any]) -> str:
    """The share of tokens that need not pass through the model, since the rows of a batch share their prefix."""
    share = 1 - entry["tokens"] / entry["plain_tokens"] if entry.get("plain_tokens") else 0
    return f", {share:.0%} saved by sharing" if share >= 0.005 else ""


def _event(entry: dict[str, Any]) -> str:
    """An event of the training log in words; "" for one that nobody need be told."""
    match entry.get("event"):
        case "dev":
            return f"update {entry['step'] + 1}, dev loss {entry['dev_loss']:.3f}, dev accuracy {entry['dev_accuracy']:.1%}"
        case "phase_end":
            best = f", as it was after update {entry['best_step'] + 1}" if entry.get("best_step", entry["step"]) != entry["step"] else ""
            return f"phase {entry['phase']} done{' early, no more gain' if entry.get('early') else ''}, dev loss {entry['dev_loss']:.3f}; adapter written{best}"
        case "best":
            return f"the best adapter on dev rows is that of phase {entry['phase']} ({entry['dev_accuracy']:.1%} of their tokens right)"
        case "teacher_answers":
            return f"the teacher answered {entry['answered']} of {entry['queries']} unlabelled queries, {entry['kept']} of them surely enough to learn from"
        case "plain_batches":
            return f"plain batches, since {entry['reason']}"
        case "warning":
            return f"warning: {entry['text']}"
    return ""


def format_money(amount: float, currency: str) -> str:
    """An amount with cents; with three digits that matter where it is below one."""
    if amount == 0:
        return f"{currency} 0"
    if abs(amount) < 1:
        return f"{currency} {amount:.{max(2, 2 - math.floor(math.log10(abs(amount))))}f}"
    return f"{currency} {amount:,.2f}"
