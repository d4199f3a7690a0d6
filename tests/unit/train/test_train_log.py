"""The training log, followed while workers write it and resumes trim it."""

import json

import pytest

from pi_ray.train.train_log import LogFollower, TrainLog


@pytest.fixture
def log(tmp_path):
    return TrainLog(tmp_path / "train.jsonl")


@pytest.fixture
def new_steps(log):
    follower = LogFollower(log.path)
    return lambda: [entry["step"] for entry in follower.new_entries()]


def test_every_entry_is_told_once(log, new_steps):
    assert new_steps() == []
    log.add({"step": 0})
    log.add({"step": 1})
    assert new_steps() == [0, 1]
    assert new_steps() == []
    log.add({"step": 2})
    assert new_steps() == [2]


def test_half_a_line_waits_for_its_other_half(log, new_steps):
    log.add({"step": 0})
    with open(log.path, "a") as f:
        f.write('{"st')
    assert new_steps() == [0]
    with open(log.path, "a") as f:
        f.write('ep": 1}\n')
    assert new_steps() == [1]


@pytest.mark.fault
@pytest.mark.parametrize("again", [1, 3, 8], ids=["shorter than it was", "as long", "longer"])
def test_after_a_trim_the_lines_in_place_of_the_dropped_ones_are_told_and_no_other(log, new_steps, again):
    for step in range(6):
        log.add({"step": step, "seconds": 1.0})
    assert new_steps() == [*range(6)]
    log.trim(3)
    for step in range(3, 3 + again):
        log.add({"step": step, "seconds": 2.0})
    assert new_steps() == [*range(3, 3 + again)]
    log.add({"step": 99})
    assert new_steps() == [99]


def test_a_log_that_begins_anew_is_told_from_its_start(log, new_steps):
    log.add({"step": 0, "seconds": 1.0})
    assert new_steps() == [0]
    log.path.write_text(json.dumps({"step": 7}) + "\n")
    assert new_steps() == [7]
