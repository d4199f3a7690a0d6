"""A soak tells what may not happen, and does not pass when a part of its programme did not."""

from collections import defaultdict

import pytest

from tests.bench.soak import Record, Soak, values_of

MINUTES = 1800.0


def record(late=100, **changes):
    memory = [(at, late if at >= 1680 else 80 if at < 300 else 100) for at in range(0, 1800, 2)]
    return Record(**{"right": 9, "cancelled": 2, "released": 3, "killed": 1, "memory": memory, **changes})


def test_a_quiet_soak_passes_and_memory_of_the_first_minutes_does_not_count():
    assert record().failures(MINUTES) == []
    assert record(late=104).failures(MINUTES) == []
    assert record(late=60).failures(MINUTES) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"late": 106}, "memory grew by 6.0%"), ({"memory": []}, "memory grew"), ({"wrong": ["a 'b'"]}, "wrong: a 'b'"),
        ({"lost": 1}, "1 streams ended early"), ({"left_open": 2.0}, "2 requests are counted"),
        ({"killed": 0}, "nothing was killed"), ({"released": 0}, "nothing was released"),
        ({"cancelled": 0}, "nothing was cancelled"), ({"right": 0}, "nothing was right"),
        ({"told": {"500": 1}}, "clients were told 500"),
    ],
)
def test_what_may_not_happen_is_said(changes, said):
    [line] = record(**changes).failures(MINUTES)
    assert said in line


def test_a_released_version_may_answer_what_was_asked_before_the_next_one():
    soak = Soak.__new__(Soak)
    soak.live = defaultdict(list, a=[(0.0, "v0001"), (10.0, "v0002"), (20.0, "v0001")])
    assert soak.live_between("a", 5.0) == {"v0001", "v0002"}
    assert soak.live_between("a", 15.0) == {"v0001", "v0002"}
    assert soak.live_between("a", 21.0) == {"v0001"}
    soak.live["a"] = [(0.0, "v0001"), (float("inf"), "v0002")]
    assert soak.live_between("a", 5.0) == {"v0001", "v0002"}, "while it is being released"


def test_gauges_of_dead_processes_do_not_count():
    text = 'ray_open{Pid="7",SessionName="s"} 2.0\nray_open{Pid="8"} 1.0\nray_open{replica="x"} 4.0\nray_other{} 9.0\n'
    assert sum(values_of(text, "open", {8})) == 5.0
