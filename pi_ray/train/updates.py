"""Which rows and which learning rate each update has: functions of the config alone, not of workers or restarts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
    """Every update of the run in order. `rows[i]` is the number of labelled rows of phase i.

    Where another run's adapter teaches, the first phase has none.
    """
    counts = [updates_in_phase(n, p, config.batch_size) for n, p in zip(rows, phases, strict=True)]
    if config.adopts_teacher:
        counts[0] = 0
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
    return _draw_rows(update, update.index * config.batch_size, config.batch_size, rows, config.seed)


@dataclass(frozen=True)
class Round:
    """Updates [begin, end), by their step, for which the student answers at once."""

    number: int
    begin: int
    end: int


def plan_rounds(updates: Sequence[Update], config: TrainConfig) -> list[Round]:
    """The rounds of the on-policy part: the last updates of the last phase (`train.distill.on_policy`)."""
    if config.objective == "sft" or not config.distill.on_policy:
        return []
    end, every = len(updates), config.distill.on_policy_every
    count = round(config.distill.on_policy * sum(u.phase == updates[-1].phase for u in updates))
    begins = range(end - count, end, every)
    return [Round(i, begin, min(begin + every, end)) for i, begin in enumerate(begins)]


@dataclass(frozen=True)
class RowKinds:
    """How many rows of each kind a phase with a teacher has. Row numbers go through them in this order."""

    labelled: int
    answered: int  # by the teacher alone
    anchor: int = 0

    def is_answered(self, number: int) -> bool:
        return self.labelled <= number < self.labelled + self.answered


def mixed_batch_rows(update: Update, kinds: RowKinds, config: TrainConfig) -> list[int]:
    """As `batch_rows`, with the shares of labelled rows (at least) and anchor rows that `train.distill` asks for."""
    distill, size, own = config.distill, config.batch_size, kinds.labelled + kinds.answered
    if not distill.anchor and distill.labelled is None:
        return batch_rows(update, own, config)
    anchor = _spread([size] * (update.index + 1), distill.anchor)
    rest = [size - count for count in anchor]
    streams = [(own, rest), (kinds.anchor, anchor)]  # (rows of a kind, how many of them each update so far has)
    if distill.labelled is not None:
        least, due = math.ceil(round(distill.labelled * size, 6)), _spread(rest, kinds.labelled / own)
        labelled = [max(count, min(least, left)) for count, left in zip(due, rest, strict=True)]
        answered = [left - count for left, count in zip(rest, labelled, strict=True)]
        streams[:1] = [(kinds.labelled, labelled), (kinds.answered, answered)]
    picked, first = list[int](), 0
    for number, (rows, counts) in enumerate(streams):
        key = [number] if number else []
        drawn = _draw_rows(update, sum(counts[:-1]), counts[-1], rows, config.seed, *key)
        picked += [first + n for n in drawn]
        first += rows
    return picked


def _spread(totals: Sequence[int], share: float) -> list[int]:
    """Whole parts of `totals` that come to `share` of their sum, as evenly as may be."""
    ends = [math.floor(total * share + 1e-9) for total in accumulate(totals, initial=0)]
    return [end - begin for begin, end in pairwise(ends)]


def _draw_rows(update: Update, position: int, count: int, rows: int, seed: int, *stream: int) -> list[int]:
    """`count` row numbers from `position` on in the phase's endless order of `rows`, shuffled anew for each epoch."""
    picked: list[int] = []
    while len(picked) < count:
        epoch, start = divmod(position + len(picked), rows)
        order = np.random.default_rng([seed, update.phase, epoch, *stream]).permutation(rows)
        picked.extend(int(n) for n in order[start : start + count - len(picked)])
    return picked
