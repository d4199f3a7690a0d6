"""Schedules: what each phase sees."""

from itertools import pairwise

import pytest

from pi_ray.config import ScheduleConfig
from pi_ray.errors import ConfigError
from pi_ray.registry import schedules
from pi_ray.schedule import Phase, plan_phases


def levels(**settings):
    return [(p.rate, p.shots) for p in plan_phases(ScheduleConfig(**settings))]


def test_linear_is_the_papers_ten_five_none():
    assert levels(name="linear", phases=3, shots=10) == [(1.0, 10), (0.5, 5), (0.0, 0)]


def test_exp_falls_faster_and_inverse_exp_slower_than_linear():
    exp, linear, inverse = (levels(name=n, phases=4, shots=9) for n in ("exp", "linear", "inverse-exp"))
    assert exp[1][0] < linear[1][0] < inverse[1][0]
    assert exp[-1] == linear[-1] == inverse[-1] == (0.0, 0)
    assert exp[0] == linear[0] == inverse[0] == (1.0, 9)


def test_a_schedule_may_halt_at_a_rate_that_stays_at_inference():
    assert levels(name="linear", phases=3, shots=2, rate_end=0.3)[-1] == (0.3, 0)


def test_direct_fine_tuning_is_a_constant_schedule():
    assert levels(name="constant", phases=1, shots=5) == [(1.0, 5)]
    assert levels(name="constant", phases=1, rate_start=0.0, shots=0) == [(0.0, 0)]


def test_a_list_is_taken_as_it_stands_and_epochs_follow_their_phase():
    listed = [{"rate": 1, "shots": 3, "epochs": 2}, {"rate": 0, "shots": 0, "epochs": 4}]
    assert plan_phases(ScheduleConfig(name="list", list=listed)) == [Phase(1, 3, 2), Phase(0, 0, 4)]
    assert [p.epochs for p in plan_phases(ScheduleConfig(phases=3, epochs=(1, 1, 5)))] == [1, 1, 5]


def test_epochs_for_the_wrong_number_of_phases_are_refused():
    with pytest.raises(ConfigError, match=r"schedule\.epochs lists 2 phases"):
        plan_phases(ScheduleConfig(phases=3, epochs=(1, 2)))


@pytest.mark.parametrize("name", [n for n in schedules.names() if n != "list"])
def test_every_schedule_gives_as_many_phases_as_asked_and_never_rises(name):
    for phases in (1, 2, 5):
        found = plan_phases(ScheduleConfig(name=name, phases=phases, shots=4))
        assert len(found) == phases
        assert all(a.rate >= b.rate and a.shots >= b.shots for a, b in pairwise(found))
