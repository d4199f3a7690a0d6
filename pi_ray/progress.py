"""What a person watches: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 10.0


class Watch:
    """`with Watch(console, "training", total) as watch: watch.to(done, "loss 0.31")`."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total = console, title, total
        self.shown = -EVERY_S
        self.recent: deque[tuple[float, int]] = deque(maxlen=10)  # (seconds, done): time left follows the present speed, not that of an earlier phase
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> Watch:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def to(self, done: int, text: str = "") -> None:
        """Progress stands at `done` of `total`."""
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
            return
        now = time.monotonic()
        self.recent.append((now, done))
        if now - self.shown >= EVERY_S or done >= self.total:
            self.shown = now
            self.console.print(f"{self.title}: {done}/{self.total}  {text}{self._left()}", highlight=False)

    def _left(self) -> str:
        (then, before), (now, done) = self.recent[0], self.recent[-1]
        return f"  {(now - then) * (self.total - done) / (done - before):.0f} s left" if done > before else ""


def training(watch: Watch) -> Callable[[dict[str, Any]], None]:
    """A listener for the training log: phase, update, loss, tokens/s, time left."""

    def listen(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            watch.to(entry["step"] + 1, f"phase {entry['phase']}  loss {entry['loss']:.3f}  {entry['tokens'] / entry['seconds']:.0f} tokens/s")
        elif entry.get("event") == "phase_end":
            watch.console.print(f"{watch.title}: phase {entry['phase']} done, dev loss {entry['dev_loss']:.3f}; adapter written", highlight=False)
        elif entry.get("event") == "plain_batches":
            watch.console.print(f"{watch.title}: plain batches, since {entry['reason']}", highlight=False)

    return listen
