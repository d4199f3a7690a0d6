"""Training workers that are killed or stopped at given places, once each. Faults are planted as files in the run
directory, so that every new process knows them.

`pi_ray.train.launch._ray_worker` is replaced by `ray_worker`; the signal is the real one, sent by the worker to itself,
so that nothing has to be timed.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """`signal` to worker `rank` at a place: in the forward pass of "update" N, in the middle of writing "checkpoint" N,
    after "phase" N has ended.
    """

    place: str
    number: int
    rank: int
    signal: int = signal.SIGKILL


def plant(root: Path, *faults: Fault) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "faults.json").write_text(json.dumps([asdict(f) for f in faults]))


def fired(root: Path) -> int:
    """How many of the faults have happened."""
    return len(list(root.glob("fired-*")))


def forwards(root: Path) -> list[int]:
    """The updates that worker 0 has begun, in order, with those that it did again."""
    return [int(line) for line in (root / "begun").read_text().split()]


def ray_worker(settings: dict[str, Any]) -> None:
    from pi_ray.train.launch import _ray_worker

    install(Path(settings["config"]["run_dir"]))
    _ray_worker(settings)


def install(root: Path) -> None:
    """Plant the faults into this process."""
    from pi_ray.run import artifact
    from pi_ray.train.trainer import Trainer

    faults = [Fault(**f) for f in json.loads((root / "faults.json").read_text())]

    def strike(place: str, number: int, rank: int) -> None:
        for i, fault in enumerate(faults):
            mark = root / f"fired-{i}"
            if (fault.place, fault.number, fault.rank) == (place, number, rank) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), fault.signal)

    one, loss, end, commit = Trainer.train_step, Trainer.summed_loss, Trainer.end_phase, artifact.commit_folder
    present: dict[str, Any] = {"rank": 0}

    def begins(self: Any, update: Any) -> None:
        present.update(step=update.step, rank=self.rank)
        if self.rank == 0:
            with open(root / "begun", "a") as f:
                f.write(f"{update.step}\n")
        one(self, update)

    def forward(self: Any, *args: Any) -> Any:
        found = loss(self, *args)
        strike("update", present["step"], self.rank)
        return found

    def ended(self: Any, update: Any, *args: Any) -> None:
        end(self, update, *args)
        strike("phase", update.phase, self.rank)

    def written(tmp: Path, final: Path) -> None:
        if final.name.startswith("step-"):
            strike("checkpoint", int(final.name.removeprefix("step-")), present["rank"])
        commit(tmp, final)

    Trainer.train_step, Trainer.summed_loss, Trainer.end_phase, artifact.commit_folder = begins, forward, ended, written

