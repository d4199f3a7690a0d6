"""Data loader: a worker's rows of each update as batches, made one update ahead in a background thread.

The order of rows is a function of seed and update number alone, so that a resumed run ends with the same bits. The next
phase's dataset is opened and verified while the present phase trains, so that no device waits at a phase transition.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from pi_ray.config import RunConfig
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import is_current
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.phases import first_taught_phase
from pi_ray.train import gist
from pi_ray.train.anchor import AnchorRows
from pi_ray.train.batches import Batch, Pack, PhaseDataset, plain_batch
from pi_ray.train.distilled_rows import DistilledRows, Targets, read_round, round_folder
from pi_ray.train.drills import make_drills
from pi_ray.train.updates import Round, Update, batch_rows, mixed_batch_rows, plan_rounds

T = TypeVar("T")
Part = list[tuple[Batch, Targets | None]]  # what one backward pass takes: two batches where rows have two prefixes


@dataclass(frozen=True)
class UpdateBatches:
    """One worker's batches of an update, each with the teacher's targets if there are any."""

    parts: list[Part]
    answer_tokens: float  # of the whole update, over all workers


class TrainDataLoader:
    """`loader[update]` is this worker's UpdateBatches. The trainer sets `has_answers` once the teacher has answered."""

    def __init__(
        self, config: RunConfig, fingerprint: str, updates: Sequence[Update], pack: Pack, rank: int = 0, world: int = 1
    ):
        self.config, self.run, self.updates, self.pack = config, RunDir(config.root), updates, pack
        self.rank, self.world, self.drills = rank, world, make_drills(config)
        self.distills, self.first_taught = wants_unlabelled(config), first_taught_phase(config)
        self.has_answers = not self.distills or is_current(self.run.teacher_answers, fingerprint)
        self._phases = Prefetcher(self._open, updates[-1].phase + 1, self._can_open)
        self.rounds, self.fingerprint = plan_rounds(updates, config.train), fingerprint
        self._rounds = Prefetcher(self._open_round, len(self.rounds), lambda number: False)
        self._batches = Prefetcher(self._make, len(updates), self._can_make)

    def __getitem__(self, update: Update) -> UpdateBatches:
        return self._batches[update.step]

    def close(self) -> None:
        self._batches.close()
        self._rounds.close()
        self._phases.close()

    def open_phase(self, phase: int) -> PhaseDataset | DistilledRows:
        return self._phases[phase]

    def round_of(self, step: int) -> Round | None:
        """The round of the on-policy part to which an update belongs."""
        return next((r for r in self.rounds if r.begin <= step < r.end), None)

    def has_round(self, asked: Round) -> bool:
        """Whether the student's answers for a round are there."""
        return is_current(round_folder(self.run, asked), self.fingerprint)

    def _can_make(self, step: int) -> bool:
        asked = self.round_of(step)
        return self._can_open(self.updates[step].phase) and (asked is None or self.has_round(asked))

    def _can_open(self, phase: int) -> bool:
        """A phase that learns from a teacher needs its answers."""
        return self.has_answers or phase < self.first_taught

    def _open(self, phase: int) -> PhaseDataset | DistilledRows:
        rows = PhaseDataset(self.run.phase(phase))
        if not self.distills or phase < self.first_taught:
            return rows
        unlabelled = PhaseDataset(self.run.phase(f"{UNLABELLED}-{phase}"))
        anchor = AnchorRows(self.config) if self.config.train.distill.anchor else None
        return DistilledRows(self.run.teacher_answers, rows, unlabelled, self.config.train, anchor)

    def _open_round(self, number: int) -> DistilledRows:
        asked = self.rounds[number]
        data = self._phases[self.updates[asked.begin].phase]
        assert isinstance(data, DistilledRows)
        return data.with_answers(read_round(self.run, asked))

    def _make(self, step: int) -> UpdateBatches:
        update, train, asked = self.updates[step], self.config.train, self.round_of(step)
        data = self._phases[update.phase] if asked is None else self._rounds[asked.number]
        if isinstance(data, DistilledRows):
            rows = mixed_batch_rows(update, data.kinds, train)
            parts = [self._taught_part(numbers, rows, data) for numbers in self._split(rows, data)]
            return UpdateBatches(parts, float(data.token_counts[rows].sum()))
        rows, prefix = batch_rows(update, len(data), train), data.prefix + gist.gist_ids(train.gist)
        labels: dict[int, list[int]] = {}
        if self.drills and not update.phase and (variant := self.drills.variant(step, rows)):
            prefix, labels = self.drills.encode(variant, rows)
        batches: list[Part] = []
        for numbers in self._split(rows, data):
            taken = zip(numbers, data.take(numbers), strict=True)
            mine = [(prompt, labels.get(n, own)) for n, (prompt, own) in taken]
            batches.append([(self.pack(prefix, mine), None)] if mine else self._idle_part(prefix, rows[:1], data))
        answer_tokens = sum(len(labels[n]) for n in rows) if labels else int(data.label_lengths[rows].sum())
        return UpdateBatches(batches, answer_tokens)

    def _taught_part(self, numbers: list[int], rows: list[int], data: DistilledRows) -> Part:
        """The batches of these of an update's rows, one for each prefix.

        Sharded weights need all workers in each pass: there every worker has a batch for each prefix of the update.
        """
        sharded = self.config.train.backend.shards_weights
        mine = {tuple(prefix): some for prefix, some in data.by_prefix(numbers)}
        passes = data.by_prefix(rows if sharded else numbers or rows[:1])
        part: Part = []
        for prefix, some in passes:
            if own := mine.get(tuple(prefix)):
                part.append((self.pack(prefix, data.take(own)), data.targets(own)))
            else:
                part += self._idle_part(prefix, some[:1], data)
        return part

    def _idle_part(self, prefix: list[int], rows: list[int], data: PhaseDataset | DistilledRows) -> Part:
        """A part in which nothing is learned, for a worker without rows: sharded models need all workers in each pass.
        """
        batch = self.pack(prefix, data.take(rows))
        return [(replace(batch, labels=torch.full_like(batch.labels, -100), tokens=0, plain_tokens=0), None)]

    def _split(self, rows: list[int], data: PhaseDataset | DistilledRows) -> list[list[int]]:
        """This worker's share of an update's rows, one list for each backward pass, as many on every worker: where they
        cannot be shared evenly, the last one may be empty.
        """
        if self.pack is plain_batch:  # rows of about one length in a batch need little padding
            rows = sorted(rows, key=lambda n: data.prompt_lengths[n] + data.label_lengths[n])
        mine, most = rows[self.rank :: self.world], self.config.train.rows_of_worker(self.world)
        size = self.config.train.micro_batch or most
        return [mine[i : i + size] for i in range(0, most, size)]


class Prefetcher(Generic[T]):
    """`prefetcher[i]` is `make(i)`; `make(i + 1)` then starts in the background, below `count` and where `can_make`.

    What `make` raises is raised where the item is asked for. Only the present and the next item are kept. The thread
    has one OpenMP thread: with more there were more than cores, and training's own would sleep between operations,
    which slows each update. Threads that start later begin with one too, unless they set their number.
    """

    def __init__(self, make: Callable[[int], T], count: int, can_make: Callable[[int], bool] = lambda i: True):
        self.make, self.count, self.can_make = make, count, can_make
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.futures: dict[int, Future[T]] = {}

    def __getitem__(self, i: int) -> T:
        if not 0 <= i < self.count:
            raise IndexError(i)
        wanted = [i, i + 1] if i + 1 < self.count and self.can_make(i + 1) else [i]
        for old in set(self.futures) - set(wanted):
            self.futures.pop(old).cancel()
        for n in wanted:
            if n not in self.futures:
                self.futures[n] = self.thread.submit(self.make, n)
        return self.futures[i].result()

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
