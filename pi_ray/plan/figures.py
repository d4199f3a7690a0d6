"""The figures of a plan: of each phase, and of the whole run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pi_ray.plan import estimate
from pi_ray.report import cost
from pi_ray.schedule import Phase

if TYPE_CHECKING:
    from pi_ray.config import RunConfig


@dataclass(frozen=True)
class PhasePlan:
    """One phase: mean tokens of its shape, updates, seconds of training; `measured` once its template is compressed."""

    phase: Phase
    rows: int
    shape: estimate.Shape
    updates: int
    seconds: float
    measured: bool

    @property
    def tokens(self) -> float:
        """Tokens of one row as the model sees it: prefix, examples and query, label."""
        return self.shape.prefix + self.shape.row + self.shape.label


@dataclass(frozen=True)
class Plan:
    """Everything that `print_plan` prints. Tokens are means per request.

    `memory` and `host` are bytes per worker in the phase that needs most, by what holds them. `plain` are the phases of
    plain fine-tuning, empty without that baseline. `teaching` are the seconds in which a teacher answers queries.
    """

    config: RunConfig
    rows: dict[str, int]
    rejects: int
    notes: list[str]
    size: estimate.ModelSize
    speed: estimate.Speed
    phases: list[PhasePlan]
    plain: list[PhasePlan]
    memory: dict[str, float]
    host: dict[str, float]
    full: estimate.Shape
    query: estimate.Shape
    money: cost.Economics
    teaching: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.phases) + self.teaching

    @property
    def saved(self) -> float:
        """Input tokens per request that inference no longer sends."""
        return self.full.prefix + self.full.row - self.query.prefix - self.query.row
