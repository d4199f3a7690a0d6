"""The phases of a run, and what all of them together need: template rates, and examples for each row."""

from __future__ import annotations

from collections.abc import Iterator

from pi_ray.config import RunConfig
from pi_ray.schedule import Phase, plan_phases


def rate_name(rate: float) -> str:
    return f"{rate:.2f}" if round(rate, 2) == rate else str(rate)


def distinct_rates(config: RunConfig) -> list[float]:
    """Every template rate that the run needs, largest first; always with 1.0, which the full-prompt baseline uses."""
    return sorted({1.0, *(p.rate for p in plan_phases(config.schedule))} - {0.0}, reverse=True)


def max_shots(config: RunConfig) -> int:
    return max(config.evaluate.shots, *(p.shots for p in plan_phases(config.schedule)))


def numbered_phases(config: RunConfig) -> Iterator[tuple[int, Phase]]:
    yield from enumerate(plan_phases(config.schedule))
