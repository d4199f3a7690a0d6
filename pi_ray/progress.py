"""What a person watches: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY_S = 10.0


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
            self.console.print(f"{self.title}: {done}/{self.total}  {text}", highlight=False)

    def _left(self, seconds: float | None) -> str:
        (then, before), (now, done) = self.recent[0], self.recent[-1]
        if seconds is None and done > before:
            seconds = (now - then) * (self.total - done) / (done - before)
        return "" if seconds is None else f"  {seconds:.0f} s left" if seconds < 120 else f"  {seconds / 60:.0f} min left"


def training(watch: Watch, costs: Sequence[float]) -> Callable[[dict[str, Any]], None]:
    """A listener for the training log: phase, update, loss, tokens/s, time left. `costs[i]` is the work of update i, in any unit."""
    ahead = [0.0, *accumulate(reversed(costs))][::-1]  # ahead[i]: the work of update i and all after it
    recent: deque[tuple[float, float]] = deque(maxlen=10)

    def listen(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            done = entry["step"] + 1
            recent.append((costs[entry["step"]], entry["seconds"]))
            left = ahead[done] * sum(s for _, s in recent) / sum(c for c, _ in recent)
            watch.to(done, f"phase {entry['phase']}  loss {entry['loss']:.3f}  {entry['tokens'] / entry['seconds']:.0f} tokens/s", left)
        elif entry.get("event") == "phase_end":
            watch.console.print(f"{watch.title}: phase {entry['phase']} done, dev loss {entry['dev_loss']:.3f}; adapter written", highlight=False)
        elif entry.get("event") == "taught":
            watch.console.print(f"{watch.title}: the teacher answered {entry['answered']} of {entry['queries']} unlabelled queries, {entry['kept']} of them surely enough to learn from", highlight=False)
        elif entry.get("event") == "plain_batches":
            watch.console.print(f"{watch.title}: plain batches, since {entry['reason']}", highlight=False)

    return listen
