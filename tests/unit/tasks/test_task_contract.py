"""The promises of the Task protocol, checked for every registered task."""

import json

import pytest

from pi_ray.cli.init import write_task
from pi_ray.config import TaskConfig
from pi_ray.prompt import Template
from pi_ray.protocols import SPLITS, Row
from pi_ray.registry import tasks


def own_files(folder, rows):
    write_task(folder)
    (folder / "queries.jsonl").write_text(
        '{"query": "Is there a parcel shop near me?"}\n{"query": "Do you ship to islands?"}\n'
    )
    names = {
        "train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl", "queries": "queries.jsonl",
        "template": "template.md",
    }
    return TaskConfig(rows=rows, **{key: str(folder / name) for key, name in names.items()})


def parallel_files(folder, rows):
    for split in SPLITS:
        (folder / f"{split}.nl").write_text(f"first of {split}\nsecond of {split}\n")
        (folder / f"{split}.cm").write_text("ls\npwd\n")
    return TaskConfig(name="nl2bash", folder=str(folder), rows=rows)


def tables_with_questions(folder, rows):
    for file in ("train", "valid", "test"):
        asked = [
            {
                "Question": f"which {name} of {file}?", "Formula2": f'FILTER({name}2:{name}3,(A2:A3="x"))',
                "Level": "easy",
            }
            for name in "AB"
        ]
        (folder / f"{file}.json").write_text(
            json.dumps([{"Table": [["", "A", "B"], ["1", "Name", "Points"], ["2", "x", "5"]], "t5Formulas": asked}])
        )
    return TaskConfig(name="nl2f", folder=str(folder), rows=rows)


def queries_with_headers(folder, rows):
    asked = [
        {"table_id": f"1-{i}-1", "question": f"points of {i}?", "sql": {"sel": 1, "agg": 0, "conds": [[0, 0, "x"]]}}
        for i in range(40)
    ]
    (folder / "dev.jsonl").write_text("".join(json.dumps(data) + "\n" for data in asked))
    blocks = [
        f"t_{i} <c> Name <t> text <c> Points <t> real <i> points of {i}? <s> SELECT Points </s>" for i in range(40)
    ]
    (folder / "validation.headers.txt").write_text("\n--SEPARATOR--\n".join(blocks))
    return TaskConfig(name="nl2f-w", folder=str(folder), rows=rows)


def problems_with_tests(folder, rows):
    numbers = (11, 12, 511, 601, 612)
    problems = [
        {
            "task_id": n, "text": f"Add {n}.", "code": f"def add(x):\r\n    return x + {n}",
            "test_list": [f"assert add(0) == {n}"],
        }
        for n in numbers
    ]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return TaskConfig(name="mbpp", folder=str(folder), rows=rows)


def messages_with_subjects(folder, rows):
    asked = {
        split: [[f"{subject} {i} of {split}", subject] for subject in ("card_lost", "refund") for i in range(2)]
        for split in ("train", "val", "test")
    }
    (folder / "data.json").write_text(json.dumps(asked))
    return TaskConfig(name="desk", folder=str(folder), rows=rows)


def conversations_with_calls(folder, rows):
    def line(*messages):
        return json.dumps({"messages": messages}) + "\n"

    for split in SPLITS:
        asked = [{"role": "user", "content": f"Where is order {i} of {split}?"} for i in range(2)]
        call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": f'{{"split": "{split}"}}'}}
        found = {"role": "tool", "tool_call_id": "c", "content": "on its way"}
        answers = [{"role": "assistant", "content": None, "tool_calls": [call]}, found,
                   {"role": "assistant", "content": f"It is on its way, as {split} says."}]
        (folder / f"{split}.jsonl").write_text("".join(line(question, *answers) for question in asked))
    queries = [line({"role": "user", "content": f"May I send back order {i}?"}) for i in range(2)]
    (folder / "queries.jsonl").write_text("".join(queries))
    (folder / "template.md").write_text("Help.\n\n## Returns\n\nWithin 30 days.")
    (folder / "tools.json").write_text('[{"type": "function", "function": {"name": "find"}}]')
    names = {split: str(folder / f"{split}.jsonl") for split in (*SPLITS, "queries")}
    names |= {"template": str(folder / "template.md"), "tools": str(folder / "tools.json")}
    return TaskConfig(name="conversations", rows=rows, **names)


CONFIGS = {
    "conversations": conversations_with_calls,
    "desk": messages_with_subjects,
    "jsonl": own_files, "mbpp": problems_with_tests, "nl2bash": parallel_files, "nl2f": tables_with_questions,
    "nl2f-w": queries_with_headers, "opsql": lambda folder, rows: TaskConfig(name="opsql", rows=rows),
}


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


def test_unlabelled_rows_have_no_answer_and_are_no_other_rows(make):
    task = make(train=1)
    others = {row.query for split in SPLITS for row in task.rows(split)}
    rows = list(task.rows("unlabelled"))
    assert all(row.answer == "" and row.query not in others for row in rows)
    assert list(task.rows("unlabelled")) == rows


def test_unlabelled_rows_are_limited_too(make):
    assert list(make("some", train=1).rows("unlabelled"))
    assert len(list(make("limited", train=1, unlabelled=1).rows("unlabelled"))) == 1


# in some or all answers of the rows above
UNSEEN = {"mbpp": "612", "nl2bash": "pwd", "nl2f": "B2:B3", "nl2f-w": "B2:B100"}


def test_no_labelled_answer_uses_a_name_that_is_to_be_unseen_and_its_queries_are_unlabelled(make):
    task = make()
    if task.config.name not in UNSEEN:
        with pytest.raises(ValueError, match="unseen"):
            task.config.model_validate({**task.config.model_dump(), "unseen": ["x"]})
        return
    name = UNSEEN[task.config.name]
    hiding = type(task)(task.config.model_copy(update={"unseen": (name,)}))
    assert list(hiding.rows("train")) == [row for row in task.rows("train") if name not in row.answer]
    assert [row.query for row in hiding.rows("unlabelled")] == [
        row.query for row in task.rows("train") if name in row.answer
    ]
    assert {(row.id, row.group) for row in hiding.rows("test")} == {
        (row.id, "template only" if name in row.answer else "like train") for row in task.rows("test")
    }
    assert hiding.fingerprint() != task.fingerprint()


def test_an_unseen_name_is_a_whole_word(make):
    task = make()
    if task.config.name in UNSEEN:
        hiding = type(task)(task.config.model_copy(update={"unseen": (UNSEEN[task.config.name][:-1],)}))
        assert list(hiding.rows("train")) == list(task.rows("train"))
