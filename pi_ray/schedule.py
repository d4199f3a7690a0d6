"""Schedules: which template rate and how many examples each phase of training sees (paper 4.1, 4.2, Table 6).

A phase keeps one value of the paper's S_tmp and S_egs for some epochs. A baseline is a schedule too: `constant` with
rate 1 and k shots is direct fine-tuning.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pi_ray.errors import ConfigError

ScheduleBlock = Any  # the block `schedule`, config.ScheduleConfig, whose file imports this one


@dataclass(frozen=True)
class Phase:
    """One stage of progressive fine-tuning."""

    rate: float  # share of template tokens that is kept, in [0, 1]
    shots: int  # examples
    epochs: int  # passes over the rows
    steps: int = 0  # updates, in place of passes where it is not 0


def plan_phases(config: ScheduleBlock) -> list[Phase]:
    """Return the phases of a run. Raises ConfigError for an unknown schedule."""
    from pi_ray.registry import schedules

    return schedules[config.name](config)


def _decreasing(config: ScheduleBlock, curve: Callable[[float], float]) -> list[Phase]:
    """Phases along `curve`, which falls from 1 (t=0) to 0 (t=1). Shots are rounded down: 5, 2, 0 as in paper A.2."""
    phases = []
    for i in range(config.phases):
        level = curve(i / (config.phases - 1)) if config.phases > 1 else 0.0
        rate = config.rate_end + (config.rate_start - config.rate_end) * level
        shots = math.floor(config.shots * level + 1e-9)
        phases.append(Phase(round(rate, 4), shots, *_phase_length(config, i)))
    return phases


def _phase_length(config: ScheduleBlock, i: int) -> tuple[int, int]:
    """(epochs, steps) of phase i. Raises ConfigError where a list of either does not fit the number of phases."""
    length: list[int] = []
    for key, value in (("epochs", config.epochs), ("steps", config.steps)):
        if not isinstance(value, int) and len(value) != config.phases:
            raise ConfigError(f"schedule.{key} lists {len(value)} phases, but schedule.phases is {config.phases}")
        length.append(value if isinstance(value, int) else value[i])
    return length[0], length[1]


def linear(config: ScheduleBlock) -> list[Phase]:
    """Fall by the same step at each phase transition: the paper's choice (Table 6)."""
    return _decreasing(config, lambda t: 1 - t)


def exp(config: ScheduleBlock) -> list[Phase]:
    """Fall fast, then slowly: (e^(-4t) - e^-4) / (1 - e^-4)."""
    return _decreasing(config, lambda t: (math.exp(-4 * t) - math.exp(-4)) / (1 - math.exp(-4)))


def inverse_exp(config: ScheduleBlock) -> list[Phase]:
    """Fall slowly, then fast: the mirror image of `exp`."""
    return _decreasing(config, lambda t: 1 - (math.exp(-4 * (1 - t)) - math.exp(-4)) / (1 - math.exp(-4)))


def constant(config: ScheduleBlock) -> list[Phase]:
    """Keep one prompt, `rate_start` and `shots`, in every phase: direct fine-tuning (Tables 2 to 4)."""
    return [Phase(config.rate_start, config.shots, *_phase_length(config, i)) for i in range(config.phases)]


def explicit(config: ScheduleBlock) -> list[Phase]:
    """Take the phases as `schedule.list` has them."""
    return [Phase(p.rate, p.shots, p.epochs, p.steps) for p in config.list]
