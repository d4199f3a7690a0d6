"""Early stopping: decides from dev scores when a phase gains no more, and keeps the state of its best score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pi_ray.train.checkpoint import State


@dataclass
class EarlyStop:
    """The best dev score of the present phase, the state that had it, and how many later scores were no better."""

    patience: int  # 0: nothing is kept and nothing stops
    best: Sequence[float] | None = None  # (score, loss): the higher score wins, of equal ones the lower loss
    step: int = -1  # the update after which `best` was scored
    adam_updates: int = 0  # updates that Adam's moments in `state` have seen
    scores_without_gain: int = 0
    state: State | None = None

    def add_score(self, score: tuple[float, float], step: int, adam_updates: int, state: Callable[[], State]) -> bool:
        """Note a score; returns True when the phase is to stop. `state` is called where the score is the best one."""
        if not self.patience:
            return False
        if self.best is None or (score[0], -score[1]) > (self.best[0], -self.best[1]):
            self.best, self.step, self.adam_updates, self.state = score, step, adam_updates, state()
            self.scores_without_gain = 0
        else:
            self.scores_without_gain += 1
        return self.scores_without_gain >= self.patience

    def facts(self) -> dict[str, Any]:
        """The fields that a checkpoint's manifest keeps; `state` is kept as tensors beside it."""
        names = ("best", "step", "adam_updates", "scores_without_gain") if self.state is not None else ()
        return {name: getattr(self, name) for name in names}
