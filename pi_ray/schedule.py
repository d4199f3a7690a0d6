"""Schedules: which template rate and how many examples each phase of training sees (paper 4.1, 4.2, Table 6).

A phase is one value of S_tmp and S_egs held for some epochs. `rate` is the kept share of template tokens (1 whole, 0 none);
`shots` the number of examples. A baseline is a schedule too: `constant(rate=1, shots=k)` is direct fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pi_ray.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """One stage of progressive fine-tuning. `rate` in [0, 1], `shots` >= 0, `epochs` >= 1 passes over the rows, or so many `steps` (updates) instead."""

    rate: float
    shots: int
    epochs: int
    steps: int = 0


class ScheduleSettings(Protocol):
    """The block `schedule` of a run file; config.ScheduleConfig checks it and says what each key means."""

    name: str
    phases: int
    rate_start: float
    rate_end: float
    shots: int
    epochs: int | tuple[int, ...]
    steps: int | tuple[int, ...]
    list: tuple[Phase, ...]


def plan_phases(config: ScheduleSettings) -> list[Phase]:
    """The phases of a run, by the schedule's name."""
    from pi_ray.registry import schedules

    return schedules[config.name](config)


def _decreasing(config: ScheduleSettings, curve: Callable[[float], float]) -> list[Phase]:
    """Phases along `curve`, which falls from 1 at t=0 to 0 at t=1; t is the phase's place. Shots are rounded down: 5, 2, 0 as in paper A.2."""
    last = max(config.phases - 1, 1)
    phases = []
    for i in range(config.phases):
        level = curve(i / last) if config.phases > 1 else 0.0
        rate = config.rate_end + (config.rate_start - config.rate_end) * level
        phases.append(Phase(round(rate, 4), math.floor(config.shots * level + 1e-9), *_length(config, i)))
    return phases


def _length(config: ScheduleSettings, i: int) -> tuple[int, int]:
    """(epochs, steps) of phase i."""
    return _of_phase(config, "epochs", i), _of_phase(config, "steps", i)


def _of_phase(config: ScheduleSettings, key: str, i: int) -> int:
    value = getattr(config, key)
    if isinstance(value, int):
        return value
    if len(value) != config.phases:
        raise ConfigError(f"schedule.{key} lists {len(value)} phases, but schedule.phases is {config.phases}")
    return value[i]


def linear(config: ScheduleSettings) -> list[Phase]:
    """Equal falls at each border: the paper's choice (Table 6)."""
    return _decreasing(config, lambda t: 1 - t)


def exp(config: ScheduleSettings) -> list[Phase]:
    """Fast fall first, then slow: (e^(-4t) - e^-4) / (1 - e^-4)."""
    return _decreasing(config, lambda t: (math.exp(-4 * t) - math.exp(-4)) / (1 - math.exp(-4)))


def inverse_exp(config: ScheduleSettings) -> list[Phase]:
    """Slow fall first, then fast: the mirror image of `exp`."""
    return _decreasing(config, lambda t: 1 - (math.exp(-4 * (1 - t)) - math.exp(-4)) / (1 - math.exp(-4)))


def constant(config: ScheduleSettings) -> list[Phase]:
    """One prompt throughout (direct fine-tuning, Tables 2 to 4): `rate_start` and `shots` in every phase."""
    return [Phase(config.rate_start, config.shots, *_length(config, i)) for i in range(config.phases)]


def explicit(config: ScheduleSettings) -> list[Phase]:
    """The phases as listed in `schedule.list`."""
    return [Phase(p.rate, p.shots, p.epochs, p.steps) for p in config.list]
