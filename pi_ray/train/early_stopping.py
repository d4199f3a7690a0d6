"""Early stop: when dev scores say that a phase gains no more, and which of its states is left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]


@dataclass
class EarlyStop:
    """The best dev score of the phase that is going on, the state that had it, and how many scores since then were no better.

    A score is (accuracy, loss): the higher accuracy wins, of equal ones the lower loss. With patience 0 nothing is kept and nothing stops.
    """

    patience: int
    best: tuple[float, float] | None = None
    step: int = -1  # the update after which `best` was scored
    optimised: int = 0  # updates that Adam's moments in `state` have seen
    since: int = 0
    state: State | None = None

    def take(self, score: tuple[float, float], step: int, optimised: int, state: Callable[[], State]) -> bool:
        """Note a score. True when it was the last one that the phase had to gain something."""
        if not self.patience:
            return False
        if self.best is None or (score[0], -score[1]) > (self.best[0], -self.best[1]):
            self.best, self.step, self.optimised, self.since, self.state = score, step, optimised, 0, state()
        else:
            self.since += 1
        return self.since >= self.patience

    def forget(self) -> None:
        """A new phase begins."""
        self.best, self.step, self.optimised, self.since, self.state = None, -1, 0, 0, None

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps of it; `state` is kept as tensors."""
        return {"best": self.best, "step": self.step, "optimised": self.optimised, "since": self.since} if self.state is not None else {}

    def restore(self, facts: dict[str, Any], state: State | None) -> None:
        if facts and state is not None:
            self.best, self.step, self.optimised, self.since, self.state = tuple(facts["best"]), facts["step"], facts["optimised"], facts["since"], state
