"""Tool calls as text: written, and read back from what a model generates."""

import json

import pytest

from pi_ray.conversation import parse_tool_calls, parse_turn, render_tool_calls, render_turn


def call(name, **arguments):
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def functions(calls):
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


def test_calls_are_written_in_the_hermes_form():
    text = render_tool_calls([call("find", city="Tromsø"), call("stop")])
    assert text == (
        '<tool_call>\n{"name": "find", "arguments": {"city": "Tromsø"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    )


def test_white_space_of_arguments_does_not_count():
    spaced = {"function": {"name": "find", "arguments": '{ "id":7 }'}}
    assert render_tool_calls([spaced]) == render_tool_calls([call("find", id=7)])


def test_what_was_written_is_read_back():
    message = {"role": "assistant", "content": "I look it up.", "tool_calls": [call("find", id=7), call("stop")]}
    content, calls = parse_tool_calls(render_turn(message))
    assert content == "I look it up."
    assert functions(calls) == [("find", {"id": 7}), ("stop", {})]
    assert [c["id"] for c in calls] == ["call_0", "call_1"]
    assert render_turn(parse_turn(render_turn(message))) == render_turn(message)


def test_an_argument_may_hold_the_marks_themselves():
    asked = call("write", text="ends </tool_call> and <tool_call> begins")
    assert functions(parse_tool_calls(render_tool_calls([asked]))[1]) == functions([asked])


@pytest.mark.parametrize("text", [
    "It is on its way.",
    '<tool_call>\n{"name": "find", "arguments": {"id": 7}}',  # cut off
    '<tool_call>\n{"name": "find"}\n</tool_call>',
    '<tool_call>\n{"name": "find", "arguments": [7]}\n</tool_call>',
    "<tool_call>\nfind(7)\n</tool_call>",
    '<tool_call>\n{"name": "find", "arguments": {"id": NaN}}\n</tool_call>',
    '<tool_call>\n{"name": "find", "arguments": {"id": 1e999}}\n</tool_call>',
    '<tool_call>\n{"name": "find", "arguments": {"id": "\\ud83d"}}\n</tool_call>',
    '{"name": "Ada", "age": 36}',
    '[{"name": "find", "arguments": {}}, 7]',
    "{", "<tool_call>" * 50, "<tool_call>" + "[" * 100_000,
])
def test_what_only_resembles_a_call_stays_content(text):
    assert parse_tool_calls(text) == (text.strip(), [])


@pytest.mark.parametrize("text", [
    '{"name": "find", "parameters": {"id": 7}}',  # Llama 3.1
    '[{"name": "find", "arguments": {"id": 7}}]',  # Mistral
    '<tool_call>{"name": "find", "arguments": {"id": 7}}</tool_call>',
])
def test_calls_in_other_forms_are_read(text):
    content, calls = parse_tool_calls(text)
    assert (content, functions(calls)) == ("", [("find", {"id": 7})])


def test_a_turn_without_calls_has_no_tool_calls():
    bare = '{"name": "find", "parameters": {}}'
    assert parse_turn(bare)["content"] == bare and parse_turn(bare, bare=True)["tool_calls"]
    assert parse_turn("Hello.") == {"role": "assistant", "content": "Hello."}
    assert parse_turn(render_tool_calls([call("stop")]))["content"] is None
