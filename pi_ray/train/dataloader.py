"""Data loader: a worker's rows of each update as batches, made one update ahead in a background thread.

The order of rows is a function of seed and update number alone, so that a resumed run ends with the same bits. The next
phase's dataset is opened and verified while the present phase trains, so that no device waits at a phase transition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pi_ray.config import RunConfig
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import is_current
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.train import gist
from pi_ray.train.batches import Batch, PhaseDataset, TokenRow, plain_batch
from pi_ray.train.distill import DistilledRows, Targets
from pi_ray.train.prefetch import Prefetcher
from pi_ray.train.updates import Update, batch_rows

Pack = Callable[[list[int], Sequence[TokenRow]], Batch]


@dataclass(frozen=True)
class UpdateBatches:
    """One worker's batches of an update, each with the teacher's targets if there are any.

    `answer_tokens` are those of the whole update, over all workers.
    """

    parts: list[tuple[Batch, Targets | None]]
    answer_tokens: int


class TrainDataLoader:
    """`loader[update]` is this worker's UpdateBatches. The trainer sets `has_answers` once the teacher has answered."""

    def __init__(
        self, config: RunConfig, fingerprint: str, updates: Sequence[Update], pack: Pack, rank: int = 0, world: int = 1
    ):
        self.config, self.run, self.updates, self.pack = config, RunDir(config.root), updates, pack
        self.rank, self.world = rank, world
        self.distills = wants_unlabelled(config)
        self.has_answers = not self.distills or is_current(self.run.teacher_answers, fingerprint)
        self._phases = Prefetcher(self._open, updates[-1].phase + 1, self._can_open)
        self._batches = Prefetcher(self._make, len(updates), lambda step: self._can_open(updates[step].phase))

    def __getitem__(self, update: Update) -> UpdateBatches:
        return self._batches[update.step]

    def close(self) -> None:
        self._batches.close()
        self._phases.close()

    def _can_open(self, phase: int) -> bool:
        """Phases after the first one need the teacher's answers."""
        return self.has_answers or not phase

    def _open(self, phase: int) -> PhaseDataset | DistilledRows:
        rows = PhaseDataset(self.run.phase(phase))
        if not self.distills or not phase:
            return rows
        unlabelled = PhaseDataset(self.run.phase(f"{UNLABELLED}-{phase}"))
        return DistilledRows(self.run.teacher_answers, rows, unlabelled, self.config.train.distill.confidence)

    def _make(self, step: int) -> UpdateBatches:
        update, train = self.updates[step], self.config.train
        data = self._phases[update.phase]
        rows = batch_rows(update, len(data), train)
        if self.pack is plain_batch:  # rows of about one length in a batch need little padding
            rows.sort(key=lambda n: data.prompt_lengths[n] + data.label_lengths[n])
        mine, size = rows[self.rank :: self.world], train.micro_batch or self.config.rows_per_worker
        prefix, parts = data.prefix + gist.gist_ids(train.gist), []
        for i in range(0, len(mine), size):
            numbers = mine[i : i + size]
            targets = data.targets(numbers) if isinstance(data, DistilledRows) else None
            parts.append((self.pack(prefix, data.take(numbers)), targets))
        return UpdateBatches(parts, int(data.label_lengths[rows].sum()))
