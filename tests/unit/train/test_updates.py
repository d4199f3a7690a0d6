"""Rows of an update where labelled rows and a teacher's answers are mixed."""

import pytest

from pi_ray.config import TrainConfig
from pi_ray.schedule import Phase
from pi_ray.train.updates import RowKinds, Update, batch_rows, mixed_batch_rows, plan_updates

KINDS = RowKinds(12, 30)


def config_of(labelled, size=8, seed=0):
    return TrainConfig(workers=1, batch_size=size, seed=seed, distill={"labelled": labelled})


def batches(config, count=21, kinds=KINDS):
    return [mixed_batch_rows(Update(100 + i, 1, i, 0, 0.1), kinds, config) for i in range(count)]


@pytest.mark.parametrize(("share", "least"), [(0.5, 4), (0.4, 4), (0.75, 6), (1.0, 8), (0.125, 1)])
def test_labelled_rows_have_at_least_their_share_of_every_batch(share, least):
    found = [sum(n < 12 for n in rows) for rows in batches(config_of(share))]
    assert min(found) >= least and all(len(rows) == 8 for rows in batches(config_of(share)))
    if least > 8 * 12 / 42:
        assert set(found) == {least}


def test_labelled_rows_that_come_often_enough_by_themselves_are_not_held_back():
    found = [sum(n < 12 for n in rows) for rows in batches(config_of(0.125))]
    assert sum(found) == 21 * 8 * 12 // 42


def test_every_row_of_a_kind_comes_once_in_its_epoch():
    rows = [n for batch in batches(config_of(0.5), 15) for n in batch]
    own, others = [n for n in rows if n < 12], [n for n in rows if n >= 12]
    assert all(sorted(own[i : i + 12]) == list(range(12)) for i in range(0, 60, 12))
    assert all(sorted(others[i : i + 30]) == list(range(12, 42)) for i in (0, 30))
    assert own[:12] != own[12:24]


def test_rows_are_a_function_of_seed_and_update():
    assert batches(config_of(0.5)) == batches(config_of(0.5)) != batches(config_of(0.5, seed=1))
    last = Update(112, 1, 12, 0, 0.1)
    assert mixed_batch_rows(last, KINDS, config_of(0.5)) == batches(config_of(0.5))[12]


def test_without_a_share_rows_come_as_they_did():
    config = config_of(None)
    updates = plan_updates([42], [Phase(1, 0, 2)], config)
    assert [mixed_batch_rows(u, KINDS, config) for u in updates] == [batch_rows(u, 42, config) for u in updates]


def test_labelled_rows_alone_fill_their_batches():
    rows = batches(config_of(0.25), 3, RowKinds(12, 0))
    assert sorted(n for batch in rows for n in batch) == sorted([*range(12), *range(12)])


@pytest.mark.parametrize("labelled", [None, 0.5])
def test_anchor_rows_have_their_share_of_all_rows_spread_evenly(labelled):
    config = TrainConfig(workers=1, batch_size=8, distill={"labelled": labelled, "anchor": 0.1})
    found = batches(config, 20, RowKinds(12, 30, 5))
    anchor = [sum(n >= 42 for n in rows) for rows in found]
    assert sum(anchor) == 16 and set(anchor) == {0, 1} and all(len(rows) == 8 for rows in found)
    drawn = [n for rows in found for n in rows if n >= 42]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(42, 47))
    if labelled:
        assert all(sum(n < 12 for n in rows) == 4 for rows in found)
