"""Which rows and which learning rate each update has: pure functions of the config, whatever the number of workers or restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pi_ray.config import TrainConfig
from pi_ray.schedule import Phase


@dataclass(frozen=True)
class Update:
    """`step` counts over the whole run, `index` within the phase."""

    step: int
    phase: int
    index: int
    epoch: int
    lr: float


def phase_updates(rows: int, phase: Phase, batch_size: int) -> int:
    """Updates of a phase of so many labelled rows. Batches are always full: the last one goes on into the next pass.

    Rows that a teacher labelled add none, so that every objective, and plain fine-tuning beside it, has the same number of updates.
    """
    return phase.steps or math.ceil(rows * phase.epochs / batch_size)


def all_updates(rows: list[int], phases: list[Phase], config: TrainConfig) -> list[Update]:
    """Every update of the run in order. `rows[i]` is the number of labelled rows of phase i."""
    counts = [phase_updates(n, p, config.batch_size) for n, p in zip(rows, phases, strict=True)]
    total, step, updates = sum(counts), 0, []
    for i, count in enumerate(counts):
        for index in range(count):
            done, of = (step, total) if config.phase_transition == "carry" else (index, count)
            updates.append(Update(step, i, index, index * config.batch_size // rows[i], learning_rate(config, done, of)))
            step += 1
    return updates


def learning_rate(config: TrainConfig, done: int, total: int) -> float:
    """Linear warm-up, then a cosine from lr to lr * lr_end."""
    warm = max(1, round(config.warmup * total))
    if done < warm:
        return config.lr * (done + 1) / warm
    progress = (done - warm) / max(1, total - warm)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_rows(update: Update, rows: int, config: TrainConfig) -> list[int]:
    """Row numbers of an update, in the order that all workers agree on: worker r takes every world-size-th from r."""
    picked: list[int] = []
    position = update.index * config.batch_size
    while len(picked) < config.batch_size:
        epoch, start = divmod(position + len(picked), rows)
        order = np.random.default_rng([config.seed, update.phase, epoch]).permutation(rows)
        picked.extend(int(n) for n in order[start : start + config.batch_size - len(picked)])
    return picked
