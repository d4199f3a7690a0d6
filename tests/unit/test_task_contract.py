"""What the Task protocol promises, over every registered task."""

import pytest

from pi_ray.config import TaskConfig
from pi_ray.prompt import Template
from pi_ray.protocols import SPLITS, Row
from pi_ray.registry import tasks
from pi_ray.scaffold import write_task


def own_files(folder, rows):
    write_task(folder)
    names = {"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl", "template": "template.md"}
    return TaskConfig(rows=rows, **{key: str(folder / name) for key, name in names.items()})


def parallel_files(folder, rows):
    for split in SPLITS:
        (folder / f"{split}.nl").write_text(f"first of {split}\nsecond of {split}\n")
        (folder / f"{split}.cm").write_text("ls\npwd\n")
    return TaskConfig(name="nl2bash", folder=str(folder), rows=rows)


CONFIGS = {"jsonl": own_files, "nl2bash": parallel_files, "opsql": lambda folder, rows: TaskConfig(name="opsql", rows=rows)}


@pytest.fixture(params=tasks.names())
def make(request, tmp_path):
    """rows limits -> a task of this name over a fresh folder."""
    if request.param not in CONFIGS:
        pytest.fail(f"task '{request.param}' is registered without a line in CONFIGS")

    def build(name="a", **rows):
        (tmp_path / name).mkdir()
        return tasks[request.param](CONFIGS[request.param](tmp_path / name, rows))

    return build


def test_rows_are_rows_with_ids_that_differ_over_all_splits(make):
    task = make()
    rows = [row for split in SPLITS for row in task.rows(split)]
    assert rows and all(isinstance(row, Row) and row.query.strip() and row.answer.strip() for row in rows)
    assert len({row.id for row in rows}) == len(rows)


def test_reading_twice_gives_the_same_rows(make):
    task = make()
    assert list(task.rows("train")) == list(task.rows("train"))


def test_a_limit_is_kept_and_larger_limits_hold_smaller_ones(make):
    one, two = (list(make(f"limit{n}", train=n).rows("train")) for n in (1, 2))
    assert len(one) == 1 and len(two) == 2 and set(one) < set(two)


def test_the_template_is_not_empty(make):
    template = make().template()
    assert isinstance(template, Template) and template.instruction and template.documents


def test_the_right_answer_scores_one_and_another_scores_less(make):
    task = make()
    for row in task.rows("test"):
        scores = task.score(row, row.answer)
        assert scores["exact_match"] == 1.0 and all(0.0 <= v <= 1.0 for v in scores.values())
        assert task.score(row, "something else")["exact_match"] == 0.0
        assert task.score(row, "").keys() == scores.keys()


def test_the_fingerprint_is_stable_and_changes_with_the_limits(make):
    assert make("b").fingerprint() == make("c").fingerprint() != make("d", train=1).fingerprint()
