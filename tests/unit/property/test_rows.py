"""Rows and request logs of users: every line is a row or a Reject with a reason."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pi_ray.config import TaskConfig
from pi_ray.conversation import check_messages, check_tools, parse_tool_calls, render_tool_calls
from pi_ray.conversation.messages import MAX_NESTING, dump_messages, load_messages
from pi_ray.conversation.tools import join_tools, split_tools
from pi_ray.errors import DataError
from pi_ray.protocols import Reject, Row
from pi_ray.request_log.request import Request, read_requests
from pi_ray.tasks.conversations import ConversationsTask
from pi_ray.tasks.jsonl import JsonlTask
from tests.unit.property.strategies import changed, deep, json_values, texts

CALL = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Oslo", "n": [1, 2]}'}}
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}},
}
MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "where?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "there"},
    {"role": "assistant", "content": [{"type": "text", "text": "there"}]},
]
ROW = {"id": "a", "query": "what is red?", "answer": "k4", "group": "easy", "documents": ["one", {"text": "two"}]}
ROWS = [
    ROW, {"instruction": "say", "input": "red", "output": "k4"},
    {"messages": [MESSAGES[1], {"role": "assistant", "content": "there"}]},
    {"conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "k4"}]},
]
REQUEST = {"request": {"messages": MESSAGES[:2], "tools": [TOOL]}, "response": {"message": MESSAGES[-1]}}
shared_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_lines(path, values):
    """A file of these values, one a line, with what JSON cannot say as Python writes it; how many lines it has."""
    lines = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in values]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return len([line for line in b"\n".join(lines).split(b"\n") if line.strip() and not _is_comment(line)])


def _is_comment(line):
    return line.lstrip().startswith((b"//", b"#"))


@shared_file
@given(st.lists(st.sampled_from(ROWS).flatmap(changed) | st.binary(max_size=60), min_size=1, max_size=4))
@example([b"[" * 9000 + b"]" * 9000])
def test_every_line_is_a_row_or_is_rejected(tmp_path, values):
    count = write_lines(tmp_path / "train.jsonl", values)
    for key, split in (("train", "train"), ("queries", "unlabelled")):
        task = JsonlTask(TaskConfig(name="jsonl", **{key: str(tmp_path / "train.jsonl")}))
        found = list(task.rows(split))
        assert len(found) == count - (count and values[0] == b"\xef\xbb\xbf")
        for row in found:
            assert row.reason if isinstance(row, Reject) else isinstance(row, Row) and row.query.strip()


@shared_file
@given(st.lists(changed({"messages": MESSAGES, "id": "a"}), min_size=1, max_size=3))
def test_every_conversation_is_taken_or_is_rejected(tmp_path, values):
    write_lines(tmp_path / "train.jsonl", values)
    (tmp_path / "template.md").write_text("Be brief.")
    files = {"train": str(tmp_path / "train.jsonl"), "template": str(tmp_path / "template.md")}
    task = ConversationsTask(TaskConfig(name="conversations", **files))
    for row in task.rows("train"):
        assert row.reason if isinstance(row, Reject) else load_messages(row.query)


@shared_file
@given(st.lists(changed(REQUEST) | changed(REQUEST["request"]) | json_values(), min_size=1, max_size=3))
def test_every_request_of_a_log_is_taken_or_is_rejected(tmp_path, values):
    write_lines(tmp_path / "log.jsonl", values)
    for found in read_requests(tmp_path / "log.jsonl"):
        assert found.reason if isinstance(found, Reject) else isinstance(found, Request) and found.turns


@given(st.binary(max_size=80))
def test_an_array_that_is_none_is_said(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_bytes(b"[" + data)
    task = JsonlTask(TaskConfig(name="jsonl", train=str(path)))
    try:
        list(task.rows("train"))
    except DataError as error:
        assert str(path) in str(error)


@given(changed(MESSAGES) | json_values())
@example([{"role": "user", "content": deep(5000)}])
def test_messages_are_taken_or_refused(messages):
    try:
        check_messages(messages)
    except ValueError as error:
        assert str(error)
    else:
        assert dump_messages(messages).encode()


@given(changed([TOOL, {"type": "function", "function": {"name": "other"}}]) | json_values())
@example([{**TOOL, "function": {**TOOL["function"], "parameters": {"a": deep(MAX_NESTING + 1)}}}])
def test_tools_are_taken_or_refused_and_come_back_from_the_text_that_stands_for_them(tools):
    try:
        check_tools(tools)
    except ValueError as error:
        assert str(error)
    else:
        assert split_tools(join_tools("Be brief.", tools)) == ("Be brief.", tools)


@given(texts | st.text(st.sampled_from('<tool_call>{"name": "f", "arguments": }/\n'), max_size=80))
@example("<tool_call>" * 2000)
@example("<tool_call>" + "[" * 5000)
def test_any_answer_is_content_and_calls(text):
    content, calls = parse_tool_calls(text)
    assert isinstance(content, str) and all(json.loads(c["function"]["arguments"]) is not None for c in calls)


@given(st.lists(st.tuples(st.text(min_size=1, max_size=9), st.dictionaries(st.text(), json_values(4))), max_size=3))
def test_calls_that_are_written_are_read_again(calls):
    named = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]
    try:
        text = render_tool_calls(named)
    except ValueError:  # NaN, half of a surrogate pair and the like
        return
    if any(not name.isprintable() for name, _ in calls):
        return
    content, found = parse_tool_calls(text, bare=False)
    assert content == "" and [(c["id"], c["function"]["name"]) for c in found] == [
        (c["id"], c["function"]["name"]) for c in named
    ]
    assert [json.loads(c["function"]["arguments"]) for c in found] == [
        json.loads(c["function"]["arguments"]) for c in named
    ]


def test_what_is_right_is_taken(tmp_path):
    write_lines(tmp_path / "train.jsonl", ROWS)
    rows = list(JsonlTask(TaskConfig(name="jsonl", train=str(tmp_path / "train.jsonl"))).rows("train"))
    assert [type(row) for row in rows] == [Row] * 4
    write_lines(tmp_path / "log.jsonl", [REQUEST])
    assert [type(found) for found in read_requests(tmp_path / "log.jsonl")] == [Request]
    check_messages(MESSAGES)
    with pytest.raises(ValueError, match="out of order"):
        check_messages(MESSAGES[::-1])
