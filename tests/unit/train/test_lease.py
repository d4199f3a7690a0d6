"""Two worker groups and one run directory: the group that started last writes."""

import json

import pytest

from pi_ray.errors import TrainingError
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
    holder = (tmp_path / "train.owner").read_text()
    TrainLog(tmp_path / "train.jsonl", writes=False).add({"step": 9})
    assert (tmp_path / "train.owner").read_text() == holder == first.holder
    first.add({"step": 0})
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [0]


def test_storage_that_cannot_be_read_for_a_moment_stops_nobody(tmp_path):
    log = TrainLog(tmp_path / "train.jsonl")
    (tmp_path / "train.owner").rename(tmp_path / "away")
    log.add({"step": 0})
    (tmp_path / "away").rename(tmp_path / "train.owner")
    log.add({"step": 1})
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [0, 1]
