"""The split of queries that nobody has labelled into train, dev and test: by units of the prompt, without near copies.

Each split gets its share of the queries about each unit, so that the test asks about the whole prompt, in words that
training did not have.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from pi_ray.ask.near import NearDuplicates
from pi_ray.protocols import SPLITS, Row
from pi_ray.run.artifact import digest
from pi_ray.units import UnitIndex, find_units

TEST_ONE_IN, DEV_ONE_IN = 5, 10  # queries, of which one is held out
MOST_TEST, MOST_DEV = 120, 60  # queries held out of any number
NEAR = 0.85  # similarity from which two queries about the same units are near copies (NearDuplicates)


def split_queries(
    rows: Sequence[Row], template: str, held_out: Mapping[str, Sequence[Row]] = MappingProxyType({})
) -> tuple[dict[str, list[Row]], int]:
    """Split -> its queries, and how many are in no split because they nearly repeat a held-out one.

    `held_out` are people's rows of dev or test: these splits get no queries. The choice depends on the texts alone, not
    on their order in a file.
    """
    index = UnitIndex(find_units(template))
    units = {row.id: frozenset(index.touched(row.query)) for row in rows}
    ordered = sorted(rows, key=lambda row: (sorted(units[row.id]), digest(row.query)))
    drawn = draw_splits(ordered, without=held_out)
    near = NearDuplicates(NEAR)
    for row in (row for some in held_out.values() for row in some):
        near.add(row.query, frozenset(index.touched(row.query)))
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS if split not in held_out}
    for split in reversed(splits):
        splits[split] = [row for row in drawn[split] if not near.finds(row.query, units[row.id])]
        for row in splits[split]:
            near.add(row.query, units[row.id])
    return splits, len(rows) - sum(map(len, splits.values()))


def draw_splits(rows: Sequence[Row], without: Collection[str] = ()) -> dict[str, list[Row]]:
    """Split -> its rows: by their places, so that each split has rows from everywhere. Those of a split `without` which
    it goes are for training.
    """
    test_one_in = max(TEST_ONE_IN, math.ceil(len(rows) / MOST_TEST))
    dev_one_in = max(DEV_ONE_IN, math.ceil(len(rows) / MOST_DEV))
    drawn: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for place, row in enumerate(rows):
        is_test, is_dev = place % test_one_in == test_one_in // 2, place % dev_one_in == dev_one_in - 1
        drawn["test" if is_test else "dev" if is_dev else "train"].append(row)
    for split in without:
        drawn["train"] += drawn.pop(split)
    return drawn
