"""Requests of a log: every usual form gives the same request, and what cannot be used has a reason."""

import json

import pytest

from pi_ray.protocols import Reject
from pi_ray.request_log.request import parse_request, read_requests

SYSTEM, USER = {"role": "system", "content": "S"}, {"role": "user", "content": "ask"}
ANSWER = {"role": "assistant", "content": "say"}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
COMPLETION = {"id": "x", "choices": [{"index": 0, "finish_reason": "stop", "message": {**ANSWER, "refusal": None}}]}
BODY = {"model": "m", "temperature": 0, "messages": [SYSTEM, USER]}


@pytest.mark.parametrize("line", [
    {"messages": [SYSTEM, USER, ANSWER]},
    {"messages": [{"role": "developer", "content": "S"}, USER, ANSWER]},
    {**BODY, "response": COMPLETION},
    {**BODY, "choices": COMPLETION["choices"]},
    {**BODY, "response": ANSWER},
    {**BODY, "response": "say"},
    {**BODY, "completion": {"message": ANSWER}},
    {"request": BODY, "response": COMPLETION},
    {"request": json.dumps(BODY), "response": json.dumps(COMPLETION)},
    {"request": {"url": "/v1", "body": BODY}, "response": {"status_code": 200, "body": COMPLETION}},
    {"custom_id": "1", "method": "POST", "body": BODY, "response": {"body": COMPLETION}},
    {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "as"}, {"type": "text", "text": "k"}]}],
     "output": COMPLETION},
])  # fmt: skip
def test_every_form_of_a_log_gives_the_same_request(line):
    found = parse_request(line)
    assert (found.system, found.tools, found.turns) == ("S", "", (USER, ANSWER))
    assert found.asked == (USER,)


@pytest.mark.parametrize("text", ['{"label": "spam"}', '{"body": 7}', "{x}", '{"error": "none"}', '{"message": "hi"}'])
def test_an_answer_that_is_json_stays_the_answer(text):
    assert parse_request({**BODY, "output": text}).turns[-1] == {"role": "assistant", "content": text}


@pytest.mark.parametrize("body", [ANSWER, {"message": ANSWER}, {"body": COMPLETION}])
def test_a_response_may_be_the_text_of_its_body(body):
    assert parse_request({**BODY, "response": json.dumps(body)}).turns[-1] == ANSWER


def test_a_response_that_is_the_text_of_an_error_is_no_answer():
    assert parse_request({**BODY, "response": json.dumps({"error": {"message": "m"}})}).turns == (USER,)


def test_tools_come_with_the_request_or_stand_beside_it():
    calling = {"messages": [USER], "response": {"role": "assistant", "content": None, "tool_calls": [CALL]}}
    for line in ({**calling, "tools": [TOOL]}, {"request": {"messages": [USER], "tools": [TOOL]}, **calling}):
        found = parse_request(line)
        assert json.loads(found.tools) == [TOOL]
        assert found.turns == (USER, {"role": "assistant", "content": None, "tool_calls": [CALL]})


def test_system_messages_that_stand_first_are_one():
    assert parse_request({"messages": [SYSTEM, {"role": "developer", "content": "T"}, USER]}).system == "S\n\nT"


@pytest.mark.parametrize("response", [
    None, {}, "", {"error": {"message": "too many requests"}}, {"choices": []},
    {"choices": [{"finish_reason": "length", "message": ANSWER}]},
    {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": None, "refusal": "no"}}]},
    {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": " "}}]},
])  # fmt: skip
def test_a_response_that_is_no_whole_answer_leaves_a_query(response):
    assert parse_request({**BODY, "response": response}).turns == (USER,)


@pytest.mark.parametrize("line, reason", [
    ([1], "must be an object"), ({"prompt": "a"}, "has 'messages'"), ({"messages": []}, "has 'messages'"),
    ({"request": "{", "response": "a"}, "not JSON"), ({"messages": [SYSTEM]}, "no user's message"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ({"messages": [ANSWER]}, "roles out of order"), ({"messages": [USER], "tools": [{"type": "x"}]}, "tools"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty assistant turn"),
    ({"messages": [USER, {"role": "tool", "tool_call_id": "c", "content": "r"}]}, "roles out of order"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}]},
     "not JSON"),
    ({"messages": [USER] * 10_000}, "10,000 messages"),
    ({"messages": [{"role": "user", "content": "a" * (1 << 21)}]}, "2,097,152 bytes"),
    ({**BODY, "response": {"choices": "a"}}, "choices"),
    ({**BODY, "response": {"role": "user", "content": "a"}}, "no assistant's message"),
])  # fmt: skip
def test_what_cannot_be_used_has_a_reason(line, reason):
    with pytest.raises(ValueError, match=reason):
        parse_request(line)


def test_bad_lines_are_rejects_with_their_number_and_the_rest_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    good = json.dumps(BODY).encode()
    path.write_bytes(b"\n".join([good, b"{", b"", b"// a comment", b"\xff", good, b'{"messages": [', good]))
    found = list(read_requests(path))
    assert [r.line for r in found] == [1, 2, 5, 6, 7, 8]
    assert [r.line for r in found if isinstance(r, Reject)] == [2, 5, 7]
    assert {r.source for r in found if isinstance(r, Reject)} == {str(path)}


def test_a_json_array_is_read_too(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps([BODY, {"prompt": "a"}, BODY]))
    assert [isinstance(r, Reject) for r in read_requests(path)] == [False, True, False]
