"""A user's own conversations: rows of single turns, what recurs taken out, precise rejects."""

import json

import pytest

from pi_ray.config import TaskConfig
from pi_ray.conversation import load_messages, parse_tool_calls
from pi_ray.errors import DataError
from pi_ray.protocols import Reject
from pi_ray.tasks.conversations import ConversationsTask

SYSTEM = "You are a clerk.\n\n## Returns\n\nWithin 30 days."
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def call(arguments='{"id": 7}'):
    function = {"name": "find", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


RESULT = {"role": "tool", "tool_call_id": "c", "content": "on its way"}
TALK = [user("Where is order 7?"), call(), RESULT, answer("On its way."), user("Thanks"), answer("Bye.")]


def task_of(folder, lines, split="train", **config):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "template.md").write_text(SYSTEM)
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    paths = {name: str(folder / f"{name}.jsonl") for name in ("train", "dev", "test", "queries")}
    paths |= {"template": str(folder / "template.md"), "tools": str(folder / "tools.json")}
    return ConversationsTask(TaskConfig(name="conversations", **paths, **config))


def read(folder, lines, split="train", **config):
    return list(task_of(folder, lines, split, **config).rows(split))


def test_a_training_row_is_a_conversation_up_to_its_last_assistant_turn(tmp_path):
    [row] = read(tmp_path, [{"id": "a", "messages": [*TALK, user("One more thing")]}])
    assert (row.id, row.answer, row.group) == ("a", "Bye.", "reply")
    assert [m["role"] for m in load_messages(row.query)] == ["user", "assistant", "tool", "assistant", "user"]


def test_each_assistant_turn_of_a_test_conversation_is_a_row_or_its_last_one_is(tmp_path):
    rows = read(tmp_path, [{"id": "a", "messages": TALK}], "test")
    assert [row.id for row in rows] == ["a#1", "a#2", "a#3"]
    assert [row.group for row in rows] == ["tool call", "reply", "reply"]
    assert [len(load_messages(row.query)) for row in rows] == [1, 3, 5]
    content, calls = parse_tool_calls(rows[0].answer)
    assert not content and calls[0]["function"] == {"name": "find", "arguments": '{"id": 7}'}
    [last] = read(tmp_path, [{"id": "a", "messages": TALK}], "test", learn="last")
    assert (last.id, last.answer) == ("a", "Bye.")


def test_a_row_that_repeats_the_system_message_and_the_tools_is_spared_of_them(tmp_path):
    bare, same, spaced, newer = read(tmp_path, [
        {"messages": TALK},
        {"messages": [{"role": "system", "content": SYSTEM}, *TALK], "tools": TOOLS},
        {"messages": [{"role": "system", "content": SYSTEM.replace("\n\n", " \n")}, *TALK]},
        {"messages": [{"role": "developer", "content": SYSTEM}, *TALK]},
    ])
    assert bare.query == same.query == spaced.query == newer.query


@pytest.mark.parametrize(("line", "reason"), [
    ({"query": "q", "answer": "a"}, "missing field: a conversation is an object with 'messages'"),
    ({"messages": [{"role": "system", "content": "Be rude."}, *TALK]}, "its system message is not that of task.templ"),
    ({"messages": [{"role": "system", "content": SYSTEM}]}, "nothing but a system message"),
    ({"messages": TALK, "tools": []}, ""),
    ({"messages": TALK, "tools": [{**TOOLS[0], "strict": True}]}, "its tools are not those of task.tools"),
    ({"messages": [user("hi"), call("{id: 7}"), RESULT, answer("x")]}, "tool_calls[0].function.arguments is not JSON"),
    ({"messages": [user("hi"), RESULT, answer("x")]}, "roles out of order"),
    ({"messages": [user("hi"), answer("x"), RESULT]}, "a tool result without its call"),
    ({"messages": [answer("x"), user("hi")]}, "roles out of order"),
    ({"messages": [user("hi"), answer("")]}, "an empty assistant turn"),
    ({"messages": [user("hi"), answer("x")] * 5000}, "10,000 messages; at most 1,000"),
    ({"messages": [user([{"type": "image_url", "image_url": {"url": "u"}}]), answer("x")]}, "no images"),
    ({"messages": [user("hi")]}, "no assistant turn"),
    ({"messages": TALK, "id": ["a"]}, "'id' must be text or a whole number"),
    ({"messages": TALK, "group": 7}, "'group' must be text"),
    ({"messages": TALK, "group": "\ud83d"}, "half of a surrogate pair"),
    ({"messages": [user("hi"), answer("x") | {"weight": 0}]}, "no assistant turn to learn"),
    ([TALK], "missing field"),
])
def test_a_bad_row_is_a_reject_with_its_line_and_the_reason(tmp_path, line, reason):
    good, found = read(tmp_path, [{"messages": TALK}, line])
    assert not isinstance(good, Reject)
    if not reason:
        assert not isinstance(found, Reject)
        return
    assert isinstance(found, Reject) and found.line == 2 and found.source.endswith("train.jsonl")
    assert reason in found.reason


def test_an_id_may_stand_once(tmp_path):
    rows = read(tmp_path, [{"id": "a", "messages": TALK}] * 2)
    assert isinstance(rows[1], Reject) and rows[1].reason == "duplicate id 'a'"


def test_the_template_is_the_system_message_and_the_tools(tmp_path):
    template = task_of(tmp_path, []).template()
    assert [json.loads(tool) for tool in template.tools] == TOOLS
    assert template.text.startswith(SYSTEM) and '"name": "find"' in template.text


def test_tools_are_counted_by_how_often_training_rows_call_them(tmp_path):
    other = {"type": "function", "function": {"name": "other"}}
    task = task_of(tmp_path, [{"messages": TALK}, {"messages": [user("hi"), call()]}, {"messages": [user("hi")]}])
    (tmp_path / "tools.json").write_text(json.dumps([other, *TOOLS]))
    assert task.template().tool_uses == (0, 2)


@pytest.mark.parametrize("content", ["{", "{}", '[{"name": "find"}]', "[" * 100_000])
def test_tools_that_are_none_are_refused(tmp_path, content):
    task = task_of(tmp_path, [])
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(DataError, match="no list of OpenAI tool definitions"):
        task.template()
    (tmp_path / "tools.json").unlink()
    with pytest.raises(DataError, match="no such file; task"):
        ConversationsTask(task.config).template()


def test_arguments_are_compared_without_their_white_space(tmp_path):
    task = task_of(tmp_path, [{"messages": TALK}], "test")
    row = next(iter(task.rows("test")))
    assert task.score(row, '<tool_call>{"name":"find","arguments":{"id":7}}</tool_call>') == {"exact_match": 1.0}
    assert task.score(row, row.answer.replace("7", "8")) == {"exact_match": 0.0}


def test_a_reply_that_is_json_is_no_call_and_scores_as_it_is(tmp_path):
    reply = '{"name": "Ann", "parameters": {"a": 1}}'
    task = task_of(tmp_path, [{"messages": [user("Who?"), answer(reply)]}], "test")
    [row] = task.rows("test")
    assert row.answer == reply and task.score(row, reply) == {"exact_match": 1.0}
    asked = task_of(tmp_path, [{"messages": TALK}], "test")
    called = asked.score(next(iter(asked.rows("test"))), '{"name": "find", "parameters": {"id": 7}}')
    assert called == {"exact_match": 1.0}


def test_turns_of_weight_0_are_neither_scored_nor_the_last_one_of_training(tmp_path):
    fed = [user("a"), answer("b") | {"weight": 0}, user("c"), answer("d"), user("e"), answer("f") | {"weight": 0}]
    [row] = read(tmp_path, [{"messages": fed}])
    assert row.answer == "d" and load_messages(row.query)[1]["weight"] == 0
    assert [row.answer for row in read(tmp_path, [{"messages": fed}], "test")] == ["d"]


def test_a_change_of_the_tools_changes_the_fingerprint(tmp_path):
    task = task_of(tmp_path, [{"messages": TALK}])
    before = task.fingerprint()
    (tmp_path / "tools.json").write_text("[]")
    assert task.fingerprint() != before
