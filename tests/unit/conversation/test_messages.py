"""check_messages: what is taken, and the reason that a bad conversation is refused with."""

import pytest

from pi_ray.conversation import MAX_MESSAGES, check_messages, content_text


def user(text="Where is my order?"):
    return {"role": "user", "content": text}


def call(name="find", arguments='{"id": 7}', call_id="c1", content=None):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": content,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}]}


def result(text="on its way", call_id="c1"):
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def answer(text="It is on its way."):
    return {"role": "assistant", "content": text}


def parallel(*ids):
    return {"role": "assistant", "content": None,
            "tool_calls": [c for i in ids for c in call(call_id=i)["tool_calls"]]}


@pytest.mark.parametrize("messages", [
    [user()],
    [{"role": "system", "content": "Be brief."}, user(), answer()],
    [user(), call(), result(), answer(), user("Thanks"), answer("Bye.")],
    [user(), call(), result(""), call(call_id="c1"), result(), answer()],  # an id may come again in a later turn
    [user(), parallel("a", "b"), result(call_id="b"), result(call_id="a"), answer()],
    [user(), answer(), user(), call()],
    [{"role": "user", "content": [{"type": "text", "text": "Two "}, {"type": "text", "text": "parts"}]}, answer()],
])
def test_a_conversation_is_taken(messages):
    check_messages(messages)


@pytest.mark.parametrize(("messages", "reason"), [
    ("no list", "must be a list"),
    ([], "not empty"),
    ([user(), "text"], r"messages\[1\] must be an object"),
    ([{"role": "function", "content": "x"}], "a role of system, user, assistant, tool"),
    ([answer()], "roles out of order: messages.0. is of role assistant, where the user's first message"),
    ([user(), user()], "roles out of order: messages.1. is of role user, after one of role user"),
    ([user(), answer(), answer()], "roles out of order"),
    ([user(), {"role": "system", "content": "x"}, answer()], "a system message, which can only be the first"),
    ([user(), result()], "roles out of order: messages.1. is of role tool"),
    ([user(), call(), result(call_id="c2")], "tool result without its call: no call before it has the id 'c2'"),
    ([user(), answer(), result()], "tool result without its call"),
    ([user(), call(), result(), result()], "tool result without its call"),
    ([user(), call(), user()], "the tool call 'c1' before it has no result"),
    ([user(), parallel("a", "b"), result(call_id="a"), answer()], "the tool call 'b' before it has no result"),
    ([user(), parallel("a", "b"), result(call_id="a")], "ends before the tool call 'b' has a result"),
    ([user(), parallel("a", "a")], "an id of its own"),
    ([user(), call(arguments="{'id': 7}")], r"tool_calls\[0\].function.arguments is not JSON"),
    ([user(), call(arguments='{"id": NaN}')], "is not JSON: NaN"),
    ([user(), call(arguments='{"id": 1e999}')], "beyond the largest"),
    ([user(), call(arguments='{"id": "\\ud83d"}')], "surrogate"),
    ([user(), call(arguments='{"\\ud83d": 7}')], "surrogate"),
    ([user(), call(arguments="[7]")], "must be a JSON object"),
    ([user(), call(arguments={"id": 7})], "must be text that holds a JSON object"),
    ([user(), call(arguments="[" * 100_000)], "is not JSON"),
    ([user(), call(arguments='{"a": ' + "[" * 100 + "]" * 100 + "}")], "JSON of at most 64 levels"),
    ([user(), call(name="")], "with the name of a function"),
    ([user(), {"role": "assistant", "content": None, "tool_calls": 7}], "must be a list"),
    ([{**user(), "tool_calls": call()["tool_calls"]}], "of role user and has tool_calls, which only an assistant's"),
    ([user(), call(), {**result(), "tool_calls": call()["tool_calls"]}], "of role tool and has tool_calls"),
    ([user(), {"role": "assistant", "content": None, "function_call": {"name": "f"}}], "empty assistant turn"),
    ([user(), answer(" \n")], "an empty assistant turn"),
    ([user(" "), answer()], r"messages\[0\].content is empty"),
    ([user(7)], "must be text"),
    ([user("a\0b")], "NUL"),
    ([user("half \ud800")], "surrogate"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], "no images"),
    ([{"role": "user", "content": [{"type": "text", "text": "hi"}, "x"]}], "only text is taken"),
])
def test_a_bad_conversation_is_refused_with_the_reason(messages, reason):
    with pytest.raises(ValueError, match=reason):
        check_messages(messages)


def test_ten_thousand_turns_are_refused_before_they_are_read():
    check_messages([user(), answer()] * (MAX_MESSAGES // 2))
    with pytest.raises(ValueError, match="10,000 messages; at most 1,000"):
        check_messages([user(), answer()] * 5000)


def test_text_parts_are_joined():
    assert content_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
    assert content_text(None) == ""
