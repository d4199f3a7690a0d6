"""A user's rows: four layouts, precise rejects, stable subsets."""

import json
import shutil

import pytest

from pi_ray.config import TaskConfig, run_file
from pi_ray.errors import DataError
from pi_ray.protocols import UNLABELLED, Reject, Row
from pi_ray.run.fingerprint import learning_settings, prepare_fingerprint
from pi_ray.tasks import jsonl
from pi_ray.tasks.jsonl import JsonlTask

GOOD = b'{"query": "q", "answer": "a"}'


def task_of(folder, content, name="train.jsonl", **config):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = {"train": name, "dev": "dev.jsonl", "test": "test.jsonl", "template": "template.md"}
    return JsonlTask(TaskConfig(**{key: str(folder / value) for key, value in paths.items()}, **config))


def read(folder, content, **options):
    return list(task_of(folder, content, **options).rows("train"))


@pytest.mark.parametrize(
    "row",
    [
        {"query": "ask", "answer": "say"},
        {"instruction": "ask", "input": "", "output": "say"},
        {"instruction": "ask", "output": "say"},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]},
        {
            "messages": [
                {"role": "system", "content": "S"}, {"role": "user", "content": "ask"},
                {"role": "assistant", "content": "say"},
            ]
        },
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in [("user", "old"), ("assistant", "older"), ("user", "ask"), ("assistant", "say")]
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "say"}]},
            ]
        },
    ],
)
def test_each_layout_gives_the_same_row(tmp_path, row):
    assert read(tmp_path, json.dumps(row)) == [Row("train-1", "ask", "say")]


def test_alpacas_input_stands_on_the_line_after_the_instruction(tmp_path):
    assert read(tmp_path, json.dumps({"instruction": "sum", "input": "1 2", "output": "3"}))[0].query == "sum\n1 2"


def test_a_json_array_is_read_with_positions_as_ids(tmp_path):
    rows = read(
        tmp_path, json.dumps([{"instruction": "a", "output": "b"}, {"output": "b"}, {"query": "c", "answer": "d"}]),
        name="train.json",
    )
    assert [rows[0].id, rows[2].id] == ["train-1", "train-3"] and (rows[1].line, rows[1].source) == (
        2, str(tmp_path / "train.json"),
    )


def test_given_ids_and_groups_are_kept_and_numbers_become_text(tmp_path):
    assert read(tmp_path, '{"query":"q","answer":"a","id":7,"group":"g"}') == [Row("7", "q", "a", "g")]


def test_comments_blank_lines_windows_line_ends_and_a_byte_order_mark_are_fine(tmp_path):
    content = b"\xef\xbb\xbf# comment\r\n\r\n  // more\n" + GOOD + b"\r\n"
    assert read(tmp_path, content) == [Row("train-4", "q", "a")]


BAD = {
    "cut off": GOOD[:-5],
    "not UTF-8": b'{"query": "\xff", "answer": "a"}',
    "missing field 'answer'": b'{"query": "q"}',
    "missing field 'query'": b'{"answer": "q"}',
    "missing field: a row has": b'{"text": "q"}',
    "'query' must be text, found a number": b'{"query": 3, "answer": "a"}',
    "'answer' must be text, found null": b'{"query": "q", "answer": null}',
    "found a list": b"[1, 2]",
    "'id' must be": b'{"query": "q", "answer": "a", "id": true}',
    "'id' is empty": b'{"query": "q", "answer": "a", "id": " "}',
    "'group' must be": b'{"query": "q", "answer": "a", "group": 1}',
    "'query' is empty": b'{"query": " \\n", "answer": "a"}',
    "'answer' is empty": b'{"query": "q", "answer": ""}',
    "duplicate id 'first'": b'{"query": "other", "answer": "a", "id": "first"}',
    "1,048,577 bytes": b'{"query": "' + b"x" * ((1 << 20) + 1) + b'", "answer": "a"}',
    "longer than 8 MiB": b'{"query": "' + b"x" * (10 << 20) + b'", "answer": "a"}',
    "NUL": b'{"query": "q\\u0000", "answer": "a"}',
    "surrogate": b'{"query": "q", "answer": "\\ud800"}',
    "must end with a user's turn": b'{"messages": [{"role": "user", "content": "q"}]}',
    "list of objects": b'{"messages": ["q", "a"]}',
    "missing field 'value'": b'{"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}',
    "messages[0].content has a part of type 'image_url'": b'{"messages": [{"role": "user", "content": '
    b'[{"type": "image_url"}]}, {"role": "assistant", "content": "a"}]}',
    "'content' must be": b'{"messages": 3}',
    "not valid JSON": b'{"query": ' + b"[" * 100_000,
    "two objects": GOOD + GOOD,
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_rejected_with_its_line_and_its_neighbours_are_kept(tmp_path, reason):
    content = b'{"query": "one", "answer": "a", "id": "first"}\n' + BAD[reason] + b"\n" + GOOD
    first, bad, last = read(tmp_path, content)
    assert (first.id, last.id) == ("first", "train-3")
    assert isinstance(bad, Reject) and bad.line == 2 and bad.source == str(tmp_path / "train.jsonl")
    assert reason in bad.reason or (reason == "'content' must be" and "'messages' must be a list" in bad.reason)


def test_missing_files_say_what_to_do_and_a_missing_dev_file_is_no_rows(tmp_path):
    task = task_of(tmp_path, GOOD)
    assert list(task.rows("dev")) == []
    with pytest.raises(DataError, match=r"test\.jsonl: no such file; put the test rows there"):
        list(task.rows("test"))
    with pytest.raises(DataError, match=r"template\.md"):
        task.template()


@pytest.mark.parametrize(("key", "split", "rows"), [("dev", "dev", "dev rows"), ("queries", UNLABELLED, "queries")])
def test_a_dev_or_query_file_that_was_named_must_be_there(tmp_path, key, split, rows):
    def read_named(path):
        return list(JsonlTask(TaskConfig(**{key: str(path)})).rows(split))

    assert read_named(tmp_path / f"{key}.jsonl") == []
    for path in (tmp_path / "misspelt.jsonl", tmp_path / "no folder" / f"{key}.jsonl"):
        with pytest.raises(DataError, match=rf"{path.name}: no such file; put the {rows} there, or .* task\.{key}"):
            read_named(path)


def test_a_broken_array_says_that_json_lines_would_lose_less(tmp_path):
    with pytest.raises(DataError, match="JSON Lines"):
        read(tmp_path, b'[{"query": "q", "answer"', name="train.json")


def numbered(n):
    return "\n".join(json.dumps({"query": f"q{i}", "answer": "a", "id": f"r{i}"}) for i in range(n))


def test_a_limit_takes_the_same_rows_each_time_in_file_order_and_keeps_rejects(tmp_path):
    content = numbered(50) + "\n{}"
    rows = read(tmp_path, content, rows={"train": 10})
    kept = [row.id for row in rows if isinstance(row, Row)]
    assert len(kept) == 10 and isinstance(rows[-1], Reject)
    assert kept == sorted(kept, key=lambda i: int(i[1:])) != [f"r{i}" for i in range(10)]
    assert set(kept) < {r.id for r in read(tmp_path, content, rows={"train": 20}) if isinstance(r, Row)}
    backwards = "\n".join(reversed(content.splitlines()))
    assert {r.id for r in read(tmp_path, backwards, rows={"train": 10}) if isinstance(r, Row)} == set(kept)


def test_a_limit_above_the_number_of_rows_takes_all(tmp_path):
    assert len(read(tmp_path, numbered(3), rows={"train": 10})) == 3


def test_rows_are_streamed_one_line_at_a_time(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(jsonl, "parse_line", lambda line: parsed.append(line) or json.loads(line))
    rows = task_of(tmp_path, numbered(100)).rows("train")
    next(rows)
    next(rows)
    assert len(parsed) == 2


def test_the_fingerprint_follows_contents_and_limits_only(tmp_path):
    base = task_of(tmp_path, GOOD).fingerprint()
    assert task_of(tmp_path, GOOD).fingerprint() == base
    assert task_of(tmp_path, GOOD, rows={"test": 3}).fingerprint() != base
    assert task_of(tmp_path, GOOD + b"\n").fingerprint() != base
    (tmp_path / "template.md").write_text("new")
    assert task_of(tmp_path, GOOD).fingerprint() != base


def test_the_score_is_exact_match(tmp_path):
    task = task_of(tmp_path, GOOD)
    assert task.score(Row("1", "q", "a b"), " a  b ") == {"exact_match": 1.0} and task.score(
        Row("1", "q", "a b"), "a"
    ) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    "row",
    [
        {"query": "ask"}, {"query": "ask", "answer": "not looked at"}, {"instruction": "ask"},
        {"messages": [{"role": "user", "content": "ask"}]},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]},
    ],
)
def test_queries_without_an_answer_come_in_the_same_layouts(tmp_path, row):
    task = JsonlTask(TaskConfig(queries=str(tmp_path / "queries.jsonl")))
    assert list(task.rows("unlabelled")) == []
    (tmp_path / "queries.jsonl").write_text(json.dumps(row) + "\n{}\n")
    found = list(task.rows("unlabelled"))
    assert found[0] == Row("unlabelled-1", "ask", "") and isinstance(found[1], Reject)


def test_a_project_that_is_moved_has_the_fingerprint_it_had_and_one_whose_rows_change_has_not(tmp_path):
    def made_from(folder):
        config = run_file.load_run_file(folder / "run.yaml")
        return prepare_fingerprint(config, JsonlTask(config.task).fingerprint()), learning_settings(config)

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "run.yaml").write_text("name: moved\n")
    for name in ("train.jsonl", "test.jsonl", "template.md"):
        (here / name).write_bytes(GOOD)
    before = made_from(here)
    shutil.move(here, there)
    assert made_from(there) == before
    (there / "train.jsonl").write_bytes(GOOD + b"\n" + GOOD)
    assert made_from(there)[0] != before[0]


def test_the_scores_are_those_of_task_metric(tmp_path):
    task = task_of(tmp_path, GOOD, metric=["number", "f1"])
    assert task.score(Row("1", "q", "a 5"), "b 5.0") == {"number": 1.0, "f1": 0.0}
    assert task.score_all([Row("1", "q", "5")] * 2, ["5", ""]) == [{"number": 1.0, "f1": 1.0}, {"number": 0, "f1": 0}]


def test_a_dev_or_test_row_that_a_metric_cannot_score_stops_the_run_with_its_line(tmp_path):
    lines = b'{"query": "q", "answer": "5"}\n\n{"query": "r", "answer": "five"}\n'
    task = task_of(tmp_path, lines, name="test.jsonl", metric="number")
    with pytest.raises(DataError, match="row 'train-3'"):
        list(task.rows("train"))  # without dev rows some of these serve as such
    (tmp_path / "dev.jsonl").write_bytes(lines[:30])
    assert len(list(task.rows("train"))) == 2, "what is only learned from need not be scored"
    with pytest.raises(DataError, match=r"test\.jsonl: row 'test-3': its answer has no number"):
        list(task.rows("test"))
