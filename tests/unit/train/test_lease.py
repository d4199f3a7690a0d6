"""Two groups of workers and one run directory: the one that started last writes."""

import json

import pytest

from pi_ray.errors import TrainingError
from pi_ray.train.lease import Lease
from pi_ray.train.train_log import TrainLog


@pytest.mark.fault
def test_a_group_that_was_given_up_stops_at_its_next_line(tmp_path):
    lost = TrainLog(tmp_path / "train.jsonl")
    lost.add({"step": 0})
    successor = TrainLog(tmp_path / "train.jsonl")
    with pytest.raises(TrainingError, match="another group of workers has taken this run over"):
        lost.add({"step": 1})
    successor.add({"step": 2})
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [0, 2]


def test_other_workers_of_the_group_take_nothing_over(tmp_path):
    first = TrainLog(tmp_path / "train.jsonl")
    TrainLog(tmp_path / "train.jsonl", writes=False).add({"step": 9})
    first.add({"step": 0})


def test_storage_that_cannot_be_read_for_a_moment_stops_nobody(tmp_path):
    lease = Lease(tmp_path / "train.owner")
    (tmp_path / "train.owner").unlink()
    lease.check()
