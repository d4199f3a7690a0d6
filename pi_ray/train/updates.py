"""Which rows and which learning rate each update has: functions of the config alone, not of workers or restarts."""

import math
from dataclasses import dataclass

import numpy as np

from pi_ray.config import TrainConfig
from pi_ray.schedule import Phase


@dataclass(frozen=True)
class Update:
    """One optimiser update. `step` counts over the whole run, `index` within the phase."""

    step: int
    phase: int
    index: int
    epoch: int
    lr: float


def updates_in_phase(rows: int, phase: Phase, batch_size: int) -> int:
    """Updates of a phase of so many labelled rows. Batches are always full: the last one goes on into the next epoch.

    Rows that a teacher labelled add none, so that every objective, and plain fine-tuning, has as many updates.
    """
    return phase.steps or math.ceil(rows * phase.epochs / batch_size)


def plan_updates(rows: list[int], phases: list[Phase], config: TrainConfig) -> list[Update]:
    """Every update of the run in order. `rows[i]` is the number of labelled rows of phase i."""
    counts = [updates_in_phase(n, p, config.batch_size) for n, p in zip(rows, phases, strict=True)]
    updates: list[Update] = []
    for phase, count in enumerate(counts):
        for index in range(count):
            step, epoch = len(updates), index * config.batch_size // rows[phase]
            position = (step, sum(counts)) if config.phase_transition == "carry" else (index, count)
            updates.append(Update(step, phase, index, epoch, learning_rate(config, *position)))
    return updates


def learning_rate(config: TrainConfig, done: int, total: int) -> float:
    """Linear warm-up, then a cosine from lr to lr * lr_end, after `done` of `total` updates."""
    warmup = max(1, round(config.warmup * total))
    if done < warmup:
        return config.lr * (done + 1) / warmup
    progress = (done - warmup) / max(1, total - warmup)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_rows(update: Update, rows: int, config: TrainConfig) -> list[int]:
    """Row numbers of an update, over all workers: worker r takes every world-size-th from r."""
    picked: list[int] = []
    position = update.index * config.batch_size
    while len(picked) < config.batch_size:
        epoch, start = divmod(position + len(picked), rows)
        order = np.random.default_rng([config.seed, update.phase, epoch]).permutation(rows)
        picked.extend(int(n) for n in order[start : start + config.batch_size - len(picked)])
    return picked
