"""The benchmark of a desk's adapters on further messages: which messages these are."""

from types import SimpleNamespace

from pi_ray.protocols import Reject, Row
from tests.bench.further import SPLITS, further_rows


def test_further_messages_are_of_no_split_of_the_run_and_always_the_same():
    rows = [Row(f"train-{i}", f"message {i}", "c1") for i in range(20)]
    task = SimpleNamespace(read_split=lambda split: [*rows, Reject("f", 21, "no subject")] if split == "train" else [])
    run = SimpleNamespace(rows_of=lambda split: [rows[SPLITS.index(split)]])
    found = further_rows(task, run, 10)
    assert len(found) == 10 and not {row.query for row in found} & {row.query for row in rows[:4]}
    assert found == further_rows(task, run, 10) and len(further_rows(task, run, 99)) == 16
