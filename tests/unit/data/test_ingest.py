"""Rows go to disk as they come, and the checks see no more of them than they need."""

import json

import pytest

from pi_ray.config import RetrieveConfig, TaskConfig
from pi_ray.data import ingest as step
from pi_ray.data.ingest import check_splits, ingest
from pi_ray.errors import DataError
from pi_ray.protocols import Row
from pi_ray.retrieve.neighbours import Bank
from pi_ray.run.directory import RunDir
from pi_ray.tasks.jsonl import JsonlTask

LONG = "tell me, as shortly as you can and without any further word, which of all the parcels is the "


def test_a_teacher_is_never_asked_what_is_evaluated_or_labelled_nor_anything_twice(tmp_path):
    splits = {
        "train": [Row("a", "How many?", "1"), Row("b", "Which?", "2")],
        "dev": [Row("c", "When?", "3")],
        "test": [Row("d", "Who is it?", "4")],
        "unlabelled": [
            Row(f"u{i}", q, "") for i, q in enumerate(["who  is IT?", "When?", "how many?", "Where?", "Why?", "where?"])
        ],
    }
    notes = check_splits(splits, [], TaskConfig(), RunDir(tmp_path))
    assert [r.query for r in splits["unlabelled"]] == ["Where?", "Why?"]
    assert notes == ["4 of 6 unlabelled queries left out, since they stand elsewhere too"]


def ingested(folder, **splits):
    """Ingest files of these (id, query) pairs; the run directory, and what was said."""
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"id": i, "query": q, "answer": "a"}) + "\n" for i, q in rows)
        )
    config = TaskConfig(**{split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")}, overlap="drop")
    run, said = RunDir(folder / "run"), []
    ingest(JsonlTask(config), config, run, "f", said.append)
    assert sorted(p.name for p in run.root.iterdir()) == ["rejects.jsonl", "rows"], "nothing else is left behind"
    return run, said[0]


def test_long_queries_are_told_apart_by_all_of_them_and_found_in_any_case(tmp_path):
    train = [("a", LONG + "last"), ("b", LONG + "first"), ("c", "short"), ("d", LONG + "middle")]
    run, said = ingested(
        tmp_path, train=train, dev=[("e", LONG + "other")], test=[("f", f"  {(LONG + 'FIRST').upper()}")]
    )
    assert [r.id for r in run.read_rows("train")] == ["a", "c", "d"] and run.read_rows("train")[
        0
    ].query == LONG + "last"
    assert said.endswith("1 train rows dropped, because their queries also stand in dev or test")


def test_an_overlap_is_shown_by_the_beginning_of_its_query(tmp_path):
    task = TaskConfig(name="x")
    rows = {
        "train": [Row("a", LONG + "last", "1")], "dev": [Row("b", "q", "1")], "test": [Row("c", LONG + "LAST", "1")],
    }
    with pytest.raises(DataError, match="train row 'a', also in test: 'tell me, as shortly"):
        check_splits({s: [step._key(r) for r in some] for s, some in rows.items()}, [], task, RunDir(tmp_path))


def test_dev_rows_are_taken_out_of_train_on_disk_too(tmp_path):
    train = [(f"t{i}", f"query {i % 19}") for i in range(20)]
    run, said = ingested(tmp_path, train=train, test=[("x", "another")])
    assert [r.id for r in run.read_rows("dev")] == ["t18", "t19"]
    assert [r.id for r in run.read_rows("train")] == [f"t{i}" for i in range(1, 18)], "t0 asks what t19 asks"
    assert (
        said
        == "rows: 17 train, 2 dev, 1 test, 0 rejected; no dev rows: the last 2 train rows serve as dev "
        "(1 more with the same queries left out of train)"
    )


def test_what_is_held_of_a_row_does_not_grow_with_it():
    key = step._key(Row("a", LONG * 1000, "an answer" * 1000))
    assert len(key.query) < 2 * step.KEY_CHARACTERS and key == step._key(Row("a", (LONG * 1000).upper(), ""))


def test_a_training_row_that_is_in_test_is_refused_also_where_it_would_become_a_dev_row(tmp_path):
    splits = {"train": [Row(f"t{i}", f"q{i}", "a") for i in range(20)], "dev": [], "test": [Row("x", "Q19", "a")]}
    with pytest.raises(DataError, match="train row 't19', also in test"):
        check_splits(splits, [], TaskConfig(), RunDir(tmp_path))


def test_dev_queries_that_stand_in_test_are_told(tmp_path):
    splits = {"train": [Row("a", "one", "1")], "dev": [Row("b", "two", "1")], "test": [Row("c", "TWO", "1")]}
    assert "1 dev queries also stand in test" in check_splits(splits, [], TaskConfig(), RunDir(tmp_path))[0]


def test_rows_with_one_query_and_other_documents_ask_something_else(tmp_path):
    def row(name, *documents):
        return Row(name, "Summarise the passage.", "a", documents=documents)

    splits = {"train": [row("a", "one"), row("b", "two")], "dev": [row("c", "three")], "test": [row("d", "four")]}
    keys = {split: [step._key(r) for r in rows] for split, rows in splits.items()}
    for rows in (splits, keys):
        (note,) = check_splits(rows, [], TaskConfig(), RunDir(tmp_path))
        assert note.startswith("2 dev and test rows have a train row's query and differ in its documents alone")
    splits["dev"], splits["test"] = [Row("c", "Who?", "a", documents=("one",))], [row("d", "four")]
    assert check_splits(splits, [], TaskConfig(), RunDir(tmp_path))[0].startswith("1 dev and test rows")
    splits["train"].append(row("e", "four"))
    with pytest.raises(DataError, match="train row 'e', also in test"):
        check_splits(splits, [], TaskConfig(), RunDir(tmp_path))
    bank = Bank([row("a", "one"), row("b", "two")], RetrieveConfig())
    assert bank.find([row("d", "one")], 2)[0].ids == ["b"], "no example asks what the row asks"


def test_an_empty_split_is_told_with_what_emptied_it(tmp_path):
    splits = {"train": [Row("a", "one", "1")], "dev": [Row("b", "two", "1")], "test": [Row("c", "ONE", "1")]}
    with pytest.raises(DataError, match=r"no train rows; .*; 1 train rows dropped, because their queries"):
        check_splits(splits, [], TaskConfig(overlap="drop"), RunDir(tmp_path))
