"""`pi-ray init FOLDER --from LOG`: from a log to a task that loads, with what was found told to the person."""

import json

import pytest

from pi_ray import cli
from pi_ray.config.run_file import load_run_file
from pi_ray.data.ingest import check_splits, read_splits
from pi_ray.errors import ConfigError, DataError
from pi_ray.plan.plan import plan_run
from pi_ray.protocols import Row
from pi_ray.registry import tasks
from pi_ray.request_log import task as request_log
from pi_ray.request_log.summary import PERSONAL, describe_logged_task
from pi_ray.run.directory import RunDir
from tests.unit.request_log.logs import SYSTEM, TOOLS, grown_requests, query, read_lines, single_turn, turn, write_log


def make(folder, lines, name="requests.jsonl"):
    """The task of a log, the lines that the command prints about it, and its checked rows."""
    log = folder / name
    log.write_text(json.dumps(lines)) if name.endswith(".json") else write_log(log, lines)
    made = request_log.write_logged_task(log, folder / "my-task")
    config = load_run_file(folder / "my-task" / "run.yaml")
    told = "\n".join(describe_logged_task(made, log))
    splits, rejects = read_splits(tasks[config.task.name](config.task))
    assert not rejects and check_splits(splits, rejects, config.task, RunDir(folder)) == []
    return made, told, config, splits


@pytest.mark.parametrize("name", ["requests.jsonl", "requests.json"])
def test_single_turns_become_rows_of_the_task_jsonl(tmp_path, name):
    lines = [single_turn(i, time=f"{i}:00", answered=i < 50) for i in range(60)]
    made, told, config, splits = make(tmp_path, lines, name)
    assert config.task.name == "jsonl" and config.name == "my-task"
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 35, "dev": 5, "test": 10}
    assert all(isinstance(row, Row) and row.query.startswith("current_time: ") for row in splits["train"])
    assert len(read_lines(tmp_path / "my-task" / "queries.jsonl")) == 10 == made.split.rows["queries"]
    assert SYSTEM.format(time="{current_time}") in (tmp_path / "my-task" / "template.md").read_text()
    assert sorted(path.name for path in (tmp_path / "my-task").iterdir()) == sorted(path.name for path in made.files)
    assert "a million (cost.input)" in told and PERSONAL in told and "'current_time: ...'" in told


def test_conversations_that_grow_become_rows_of_the_task_conversations(tmp_path):
    made, told, config, splits = make(tmp_path, [line for i in range(12) for line in grown_requests(i)])
    assert json.loads((tmp_path / "my-task" / "tools.json").read_text()) == TOOLS
    assert config.task.name == "conversations" and config.task.tools.endswith("tools.json")
    assert made.split.requests == 48 and len(splits["train"]) == 9
    first = read_lines(tmp_path / "my-task" / "train.jsonl")[0]["messages"]
    assert len(first) == 8 and first[0]["content"].startswith("current_time: ")
    assert {message["role"] for message in first} == {"user", "assistant", "tool"}
    assert "2 tools" in told and f"{made.tokens.recurrent:,} of the " in told


def test_tools_without_a_system_message_are_a_whole_template(tmp_path):
    lines = [{**line, "messages": line["messages"][1:]} for i in range(12) for line in grown_requests(i)]
    made, told, config, _ = make(tmp_path, lines)
    template = tasks[config.task.name](config.task).template()
    assert template.instruction == "" and len(template.tools) == 2 and template.tool_uses == (9, 0)
    assert made.tokens.recurrent > 0 and "Prompt: 2 tools\n" in told


def test_what_recurs_is_counted_in_tokens_of_all_requests_of_a_conversation(tmp_path):
    made, *_ = make(tmp_path, [line for i in range(12) for line in grown_requests(i)])
    own = made.tokens.whole - made.tokens.recurrent
    (tmp_path / "short").mkdir()
    short, *_ = make(tmp_path / "short", [line for i in range(12) for line in grown_requests(i)[:1]])
    assert 0 < short.tokens.whole - short.tokens.recurrent < own, "earlier turns are sent again with each request"
    assert short.tokens.recurrent == made.tokens.recurrent > 200


def test_a_log_without_answers_is_for_a_teacher(tmp_path):
    made, _, config, _ = make_unanswered(tmp_path, [single_turn(i, answered=False) for i in range(20)])
    assert config.train.objective == "distill" and config.train.distill.teacher == "base" and not config.task.train
    assert made.split.rows == {"queries": 20} and plan_run(config).rows["train"] > 0, "it can be planned"


def make_unanswered(folder, lines):
    log = write_log(folder / "log.jsonl", lines)
    made = request_log.write_logged_task(log, folder / "my-task")
    return made, "\n".join(describe_logged_task(made, log)), load_run_file(folder / "my-task" / "run.yaml"), None


def test_conversations_without_answers_are_an_error(tmp_path):
    lines = [{"messages": [turn("user", query(i))], "tools": TOOLS} for i in range(9)]
    with pytest.raises(DataError, match="none of its conversations has an answer"):
        request_log.write_logged_task(write_log(tmp_path / "log.jsonl", lines), tmp_path / "my-task")


def test_the_largest_of_several_prompts_is_taken_and_the_others_are_named(tmp_path):
    french = turn("system", "Translate into French what the user writes.")
    lines = [single_turn(i) for i in range(30)]
    lines += [{"messages": [french, turn("user", query(i)), turn("assistant", "oui")]} for i in range(7)]
    made, told, _, splits = make(tmp_path, lines)
    assert sum(map(len, splits.values())) == 30 and [count for _, count in made.others] == [7]
    assert "7 of 'Translate into French what the user writes.'" in told and "give a log of its requests alone" in told


def test_few_shot_turns_stand_in_the_template_and_not_in_the_rows(tmp_path):
    shots = [turn("user", "My card is gone"), turn("assistant", "card")]
    lines = [{"messages": [turn("system", "Sort it."), *shots, turn("user", query(i)), turn("assistant", "loan")]}
             for i in range(20)]
    _, told, config, splits = make(tmp_path, lines)
    template = tasks["jsonl"](config.task).template()
    assert template.documents == ("## Examples\n\nUser: My card is gone\nAssistant: card",)
    assert {row.query for rows in splits.values() for row in rows} == set(map(query, range(20)))
    assert "2 few-shot turns" in told


def test_bad_lines_are_listed_and_the_rest_is_used(tmp_path):
    lines = [single_turn(i) for i in range(30)]
    lines[4:4] = [{"messages": []}, [1], {"messages": [turn("assistant", "a")]}, {"prompt": "x"}]
    made, told, _, _ = make(tmp_path, lines)
    rejects = read_lines(tmp_path / "my-task" / "rejects.jsonl")
    assert [reject["line"] for reject in rejects] == [5, 6, 7, 8] and made.rejected == 4
    assert all(reject["reason"] for reject in rejects) and "line 5: missing field" in told and "rejects.jsonl" in told


@pytest.mark.parametrize("content, reason", [
    ("", "it is empty"), ("{\n[1]\n", "line 1: not valid JSON"),
    ("\n".join(json.dumps({"messages": [turn("user", query(i))], "response": "x"}) for i in range(20)), "nothing"),
    ("\n".join(json.dumps(single_turn(i)) for i in range(2)), "2 different conversations"),
])  # fmt: skip
def test_a_hopeless_log_is_an_error_that_leaves_nothing_behind(tmp_path, content, reason):
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    with pytest.raises(DataError, match=reason):
        request_log.write_logged_task(log, tmp_path / "my-task")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_missing_log_and_an_existing_file_are_errors(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "a"), "--from", str(tmp_path / "none.jsonl")]) == DataError.exit_code
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tools.json").write_text("mine")
    log = write_log(tmp_path / "log.jsonl", [single_turn(i) for i in range(9)])
    assert cli.main(["init", str(tmp_path / "b"), "--from", str(log)]) == ConfigError.exit_code
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["tools.json"]
    assert "no such file" in (told := capsys.readouterr().err) and "tools.json already there" in told


def test_a_name_of_digits_stays_text(tmp_path):
    log = write_log(tmp_path / "log.jsonl", [single_turn(i) for i in range(30)])
    assert cli.main(["init", str(tmp_path / "2026"), "--from", str(log)]) == 0
    assert load_run_file(tmp_path / "2026" / "run.yaml").name == "2026"


def test_the_command_tells_what_it_wrote_and_what_comes_next(tmp_path, capsys):
    log = write_log(tmp_path / "log.jsonl", [single_turn(i) for i in range(30)])
    assert cli.main(["init", str(tmp_path / "Mail Desk"), "--from", str(log)]) == 0
    told = capsys.readouterr().out
    assert "template.md" in told and "pi-ray run" in told and PERSONAL in told
    assert load_run_file(tmp_path / "Mail Desk" / "run.yaml").name == "mail-desk"


def test_the_run_file_comments_every_key(tmp_path):
    make(tmp_path, [line for i in range(12) for line in grown_requests(i)])
    text = (tmp_path / "my-task" / "run.yaml").read_text()
    keys = [line for line in text.splitlines() if line.startswith("  ") and "name: linear" not in line]
    assert all(" # " in line for line in keys) and "{" not in text.partition("rows:")[0]
