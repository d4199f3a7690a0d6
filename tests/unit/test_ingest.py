"""Unlabelled queries are those that stand nowhere else."""

from pi_ray.config import TaskConfig
from pi_ray.ingest import check
from pi_ray.protocols import Row
from pi_ray.rundir import RunDir


def test_a_teacher_is_never_asked_what_is_evaluated_or_labelled_nor_anything_twice(tmp_path):
    splits = {
        "train": [Row("a", "How many?", "1"), Row("b", "Which?", "2")], "dev": [Row("c", "When?", "3")], "test": [Row("d", "Who is it?", "4")],
        "unlabelled": [Row(f"u{i}", q, "") for i, q in enumerate(["who  is IT?", "When?", "how many?", "Where?", "Why?", "where?"])],
    }
    notes = check(splits, [], TaskConfig(), RunDir(tmp_path))
    assert [r.query for r in splits["unlabelled"]] == ["Where?", "Why?"]
    assert notes == ["4 of 6 unlabelled queries left out, since they stand elsewhere too"]
