"""What a worker's updates are fed with: its rows of each update as batches, made one update ahead, so that no device waits for them, not at a phase border either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pi_ray.config import RunConfig
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import is_current
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.train import gist
from pi_ray.train.batches import Batch, PhaseRows, plain
from pi_ray.train.distill import Row, Targets, Taught
from pi_ray.train.prefetch import Ahead
from pi_ray.train.updates import Update, batch_rows

Pack = Callable[[list[int], Sequence[Row]], Batch]


@dataclass(frozen=True)
class Ready:
    """One worker's part of an update: `parts` are its forward passes, with the teacher's targets where there are any; `answer_tokens` of all workers together."""

    parts: list[tuple[Batch, Targets | None]]
    answer_tokens: int


class Feed:
    """`feed[update]` is Ready. The dataset of the next phase is opened and checked while the present one trains, and the next update's batches are made meanwhile."""

    def __init__(self, config: RunConfig, fingerprint: str, updates: Sequence[Update], pack: Pack, rank: int = 0, world: int = 1):
        self.config, self.run, self.updates, self.pack = config, RunDir(config.root), updates, pack
        self.rank, self.world = rank, world
        self.teaches = wants_unlabelled(config)
        self.taught = not self.teaches or is_current(self.run.taught, fingerprint)  # set by the worker when the teacher has answered
        self._phases = Ahead(self._open, updates[-1].phase + 1, self._may_open)
        self._ready = Ahead(self._make, len(updates), lambda step: self._may_open(updates[step].phase))

    def __getitem__(self, update: Update) -> Ready:
        return self._ready[update.step]

    def close(self) -> None:
        self._ready.close()
        self._phases.close()

    def _may_open(self, phase: int) -> bool:
        """Phases after the first one have the teacher's answers as rows, once there are some."""
        return self.taught or not phase

    def _open(self, phase: int) -> PhaseRows | Taught:
        rows = PhaseRows(self.run.phase(phase))
        if not self.teaches or not phase:
            return rows
        return Taught(self.run.taught, rows, PhaseRows(self.run.phase(f"{UNLABELLED}-{phase}")), self.config.train.distill.confidence)

    def _make(self, step: int) -> Ready:
        update, train = self.updates[step], self.config.train
        data = self._phases[update.phase]
        rows = batch_rows(update, len(data), train)
        if self.pack is plain:  # rows of about one length in each pass need little padding
            rows.sort(key=lambda n: data.prompt_lengths[n] + data.label_lengths[n])
        mine, size = rows[self.rank :: self.world], train.micro_batch or self.config.rows_per_worker
        return Ready([self._part(data, mine[i : i + size]) for i in range(0, len(mine), size)], int(data.label_lengths[rows].sum()))

    def _part(self, data: PhaseRows | Taught, numbers: list[int]) -> tuple[Batch, Targets | None]:
        batch = self.pack(data.prefix + gist.ids(self.config.train.gist), data.take(numbers))
        return batch, data.targets(numbers) if isinstance(data, Taught) else None
