"""The phases of a run, and the template rates and examples that all of them together need."""

from __future__ import annotations

from collections.abc import Iterator

from pi_ray.config import RunConfig
from pi_ray.schedule import Phase, plan_phases


def rate_name(rate: float) -> str:
    """A template rate as file names have it."""
    return f"{rate:.2f}" if round(rate, 2) == rate else str(rate)


def distinct_rates(config: RunConfig) -> list[float]:
    """Every template rate of the run, largest first; always with 1.0, which the full-prompt baseline uses."""
    return sorted({1.0, *(p.rate for p in plan_phases(config.schedule))} - {0.0}, reverse=True)


def max_shots(config: RunConfig) -> int:
    """The most examples that any phase, or the evaluation, puts before a query."""
    return max(config.evaluate.shots, *(p.shots for p in plan_phases(config.schedule)))


def numbered_phases(config: RunConfig) -> Iterator[tuple[int, Phase]]:
    return enumerate(plan_phases(config.schedule))
