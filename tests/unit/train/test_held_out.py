"""Held-out queries cover the units of a prompt, and leave each unit enough to be learned from."""

from collections import Counter

import pytest

from pi_ray.train.held_out import MOST_OF_UNIT, ONE_IN, choose_held_out
from pi_ray.units import UnitIndex, find_units

NAMES = ["billing", "logins", "delivery", "returns", "gifts", "parking"]
UNITS = UnitIndex(find_units("Answer with a code.\n\n## Queues\n\n" + "\n".join(f"{n}: {n[0]}{n[1]}9" for n in NAMES)))
TEXTS = [f"request {i} about {NAMES[i % 5]}, thanks" for i in range(200)] + ["parking, please"] * 8


def about(places):
    return Counter(UNITS.units[unit].text.split(":")[0] for n in places for unit in UNITS.touched(TEXTS[n]))


def test_every_unit_gets_its_first_query_before_any_gets_a_second():
    assert about(choose_held_out(UNITS, TEXTS, 5 / len(TEXTS))) == dict.fromkeys(NAMES[:5], 1)
    assert about(choose_held_out(UNITS, TEXTS, 7 / len(TEXTS))).total() == 7
    assert about(choose_held_out(UNITS, TEXTS, 0.5)) == dict.fromkeys(NAMES[:5], MOST_OF_UNIT)


def test_the_choice_does_not_depend_on_the_order():
    chosen = {TEXTS[n] for n in choose_held_out(UNITS, TEXTS, 0.1)}
    assert {TEXTS[::-1][n] for n in choose_held_out(UNITS, TEXTS[::-1], 0.1)} == chosen


def test_a_query_that_would_also_be_learned_from_is_not_held_out():
    assert "parking" not in about(choose_held_out(UNITS, TEXTS, 0.5))


@pytest.mark.parametrize("count, held", [(ONE_IN - 1, 0), (ONE_IN, 1)])
def test_a_unit_with_few_queries_keeps_them(count, held):
    assert len(choose_held_out(UNITS, [f"case {i}: billing" for i in range(count)], 0.5)) == held


def test_none_are_held_out_where_the_share_is_nothing():
    assert choose_held_out(UNITS, TEXTS, 0.0) == [] and choose_held_out(UNITS, [], 0.1) == []
