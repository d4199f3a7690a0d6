"""MBPP: the release's lines -> rows by upstream's split, and programs that are scored by the row's own tests."""

import json
import os
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from pi_ray.config import ModelConfig, TaskConfig
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.mbpp import FILE, MbppTask, extract_code

ROOT = Path(__file__).parents[3]
ADD = {
    "task_id": 11, "text": "Add one.", "code": "def add(x):\r\n\treturn x + 1 \r\n\r\n",
    "test_list": ["assert add(1) == 2 ", "assert add(2) == 3", "assert add(-1) == 0"],
}
NODE = {
    "task_id": 12, "text": "Depth of a tree.",
    "code": "class Node:\n    left = None\ndef depth(n): return 1 + depth(n.left) if n else 0",
    "test_setup_code": "root = Node()\r\nroot.left = Node()",
}
NODE["test_list"] = ["assert depth(root) == 2"]


def written(folder, *lines):
    (folder / FILE).write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return folder


def task_of(folder, **config):
    return MbppTask(TaskConfig(name="mbpp", folder=str(folder), **config))


@pytest.fixture
def published():
    found = Path(os.environ.get("PI_RAY_DATA") or ROOT.parent / "shared" / "data") / "mbpp"
    if not (found / FILE).is_file():
        pytest.fail(f"{found}: no MBPP here; set PI_RAY_DATA to the folder that holds mbpp/{FILE}")
    return found


def test_a_row_asks_with_its_tests_and_answers_with_clean_code(tmp_path):
    query = "NL Question: Add one.\nThree Test Cases:\nassert add(1) == 2\nassert add(2) == 3\nassert add(-1) == 0"
    assert list(task_of(written(tmp_path, ADD)).rows("test")) == [Row("11", query, "def add(x):\n\treturn x + 1")]


def test_the_split_is_upstreams_and_the_first_ten_are_left_out(tmp_path):
    task = task_of(written(tmp_path, *({**ADD, "task_id": n} for n in (1, 10, 11, 510, 511, 600, 601, 974, 975))))
    assert {split: [row.id for row in task.rows(split)] for split in ("train", "dev", "test", "unlabelled")} == {
        "train": ["601", "974"], "dev": ["511", "600"], "test": ["11", "510"], "unlabelled": [],
    }  # fmt: skip


def test_the_papers_split_has_its_102_test_rows_and_trains_on_all_but_30_others(tmp_path):
    task = task_of(written(tmp_path, *({**ADD, "task_id": n} for n in range(1, 975))), split="paper")
    ids = {split: [int(row.id) for row in task.rows(split)] for split in ("train", "dev", "test")}
    assert {split: len(found) for split, found in ids.items()} == {"train": 842, "dev": 30, "test": 102}
    assert sorted(chain(*ids.values())) == list(range(1, 975)), "no row is on two sides"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"), ("[1]", "task_id"), ({**ADD, "task_id": "11"}, "task_id"),
        ({**ADD, "code": " "}, "task 11: text, code"), ({**ADD, "test_list": []}, "task 11: text, code"),
        ({**ADD, "test_list": ["assert add(1) == "]}, "task 11: a test is not valid Python"),
        ({**ADD, "test_list": ["add(1)"]}, "asserts"), ({**ADD, "test_list": [1, 2]}, "must be text"),
    ],
)
def test_an_unusable_line_is_rejected_once_with_its_reason(tmp_path, line, reason):
    task = task_of(written(tmp_path, {**ADD, "task_id": 12}, line))
    (reject,) = (found for split in ("train", "dev", "test") for found in task.rows(split) if isinstance(found, Reject))
    assert reject.line == 2 and reason in reject.reason


def test_the_second_line_of_an_id_is_rejected(tmp_path):
    assert [found.reason for found in task_of(written(tmp_path, ADD, ADD)).rows("train")] == ["duplicate task_id 11"]


def test_a_missing_file_says_what_it_is_and_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"lacks mbpp\.jsonl.*google-research"):
        list(task_of(tmp_path).rows("train"))


def test_without_a_folder_the_rows_come_from_the_hub_or_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(
            load_dataset=lambda name, part: (
                {"prompt": [], "test": [ADD]} if (name, part) == ("google-research-datasets/mbpp", "full") else {}
            )
        ),
    )
    assert [row.id for row in task_of("").rows("test")] == ["11"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets, or set task\.folder .*mbpp\.jsonl"):
        list(task_of("").rows("test"))


def test_the_fingerprint_follows_contents_and_limits_and_not_how_scores_are_made(tmp_path):
    base = task_of(written(tmp_path, ADD)).fingerprint()
    assert (
        task_of(tmp_path).fingerprint()
        == task_of(tmp_path, allow_code_execution=True).fingerprint()
        == base
        != task_of(tmp_path, rows={"train": 2}).fingerprint()
    )
    assert task_of(written(tmp_path, NODE)).fingerprint() != base


def test_the_template_follows_the_paper():
    template = task_of("").template()
    assert template.instruction.startswith("You are an advanced Python programmer.")
    assert len(template.documents) == 1 and template.documents[0].count("\n- ") == 6
    assert 180 <= len(load_tokenizer(ModelConfig())(template.text, add_special_tokens=False).input_ids) <= 280


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("x = 1", "x = 1"), ("```python\nx = 1\n```", "x = 1\n"),
        ("Here it is:\n```py\r\nx = 1\n```\nand\n```\ny\n```", "x = 1\n"), ("```\nx = 1", "x = 1"),
        ("a = '```'", "a = '```'"), ("", ""),
    ],
)
def test_code_is_taken_out_of_its_fence(output, code):
    assert extract_code(output) == code


def test_nothing_is_run_unless_it_is_allowed(tmp_path):
    task = task_of(written(tmp_path, ADD))
    row = next(task.rows("test"))
    assert task.score(row, row.answer) == {"exact_match": 1.0} and task.score(row, "") == {"exact_match": 0.0}
    assert "_sandbox" not in vars(task)


def test_pass_at_1_runs_code_then_set_up_then_tests_and_says_what_protects(tmp_path, capsys):
    task = task_of(written(tmp_path, ADD, NODE), allow_code_execution=True, unsafe_local_execution=True)
    add, node = task.rows("test")
    outputs = [
        (add, add.answer), (add, "```python\ndef add(y): return 1 + y\n```"), (add, "def add(x): return 2"), (add, ""),
        (node, node.answer), (node, "import os\nos._exit(0)"),
    ]
    scores = task.score_all(*zip(*outputs, strict=True))
    assert [(s["exact_match"], s["pass_at_1"]) for s in scores] == [(1, 1), (0, 1), (0, 0), (0, 0), (1, 1), (0, 0)]
    assert task.score(*outputs[0]) == scores[0]
    printed = capsys.readouterr().err
    assert (
        printed.startswith("generated code runs with these protections:\n  ")
        and printed.count("generated code runs with these protections") == 1
    )


def test_only_the_slow_row_may_take_long_and_an_unknown_row_is_an_error(tmp_path):
    task = task_of(written(tmp_path, ADD, {**ADD, "task_id": 123}))
    assert [task.program(row, "").limits and task.program(row, "").limits.seconds for row in task.rows("test")] == [
        None, 90.0,
    ]
    with pytest.raises(DataError, match="row '99' is not in"):
        task.program(Row("99", "q", "a"), "")


def test_the_published_release_has_all_rows_of_each_split_and_no_rejects(published):
    task = task_of(published)
    rows = {split: list(task.rows(split)) for split in ("train", "dev", "test")}
    assert {split: len(r) for split, r in rows.items()} == {"train": 374, "dev": 90, "test": 500}
    assert all(
        isinstance(row, Row) and "\r" not in row.query + row.answer and row.query.count("\nassert ") == 3
        for r in rows.values()
        for row in r
    )
    assert sum("\t" in row.answer for r in rows.values() for row in r) == 126


def test_published_reference_solutions_pass_and_those_of_others_do_not(published):
    task = task_of(published, allow_code_execution=True, unsafe_local_execution=True)
    # 126 defines a `sum` of its own, 367 has a set-up
    rows = [row for row in task.rows("test") if row.id in ("11", "126", "367")]
    scores = task.score_all([*rows, *rows], [row.answer for row in [*rows, *rows[1:], rows[0]]])
    assert [s["pass_at_1"] for s in scores] == [1, 1, 1, 0, 0, 0]
