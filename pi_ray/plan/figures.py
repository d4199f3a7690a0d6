"""The figures of a plan: of each phase, and of the whole run."""

from dataclasses import dataclass

from pi_ray.config import RunConfig
from pi_ray.plan import estimate
from pi_ray.plan.asking import AskingPlan
from pi_ray.report import cost
from pi_ray.schedule import Phase


@dataclass(frozen=True)
class PhasePlan:
    """One phase: mean tokens of its shape, updates, seconds of training."""

    phase: Phase
    rows: int
    shape: estimate.Shape
    updates: int
    seconds: float
    measured: bool  # whether its template is compressed, so that its tokens are counted


@dataclass(frozen=True)
class Plan:
    """Everything that `print_plan` prints."""

    config: RunConfig
    rows: dict[str, int]
    rejects: int
    notes: list[str]
    size: estimate.ModelSize
    speed: estimate.Speed
    phases: list[PhasePlan]
    plain: list[PhasePlan]  # of plain fine-tuning, empty without that baseline
    memory: dict[str, float]  # bytes per worker in the phase that needs most, by what holds them
    host: dict[str, float]  # bytes of the host likewise
    replica: dict[str, float]  # bytes of one copy of the base that generates, likewise; empty on CPUs
    full: estimate.Shape  # of a request with the full prompt
    query: estimate.Shape  # of a request to the adapter
    money: cost.Economics
    teaching: float = 0.0  # seconds in which a teacher answers queries
    answering: float = 0.0  # seconds in which phases answer dev rows, for a quality floor or task.metric
    scored: int = 0  # those dev rows
    asking: AskingPlan | None = None  # where queries are generated
    drills: str = ""  # what reading drills exchange, or why there are none

    @property
    def seconds(self) -> float:
        asking = self.asking.seconds if self.asking else 0.0
        return asking + sum(p.seconds for p in self.phases) + self.teaching + self.answering
