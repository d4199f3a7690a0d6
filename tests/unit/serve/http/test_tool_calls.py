"""Tool calls in streamed text: the same content and calls wherever the text is cut, and what is no call is text."""

import asyncio
import random
from itertools import pairwise

import pytest

from pi_ray.conversation import parse_tool_calls, render_tool_calls
from pi_ray.serve.http.tool_calls import ToolCallReader, split_tool_calls


def call(name="weather", arguments='{"city": "Oslo"}'):
    return render_tool_calls([{"function": {"name": name, "arguments": arguments}}])


TEXTS = [
    "No call at all.",
    call(),
    "Let me look.\n\n" + call() + "\n" + call("time", "{}"),
    call() + "\nand now?",
    call(arguments='{"text": "a </tool_call> b <tool_call> c"}'),
    "a < b, <tool is none, <tool_call",
    '<tool_call>\n{"name": "weather"}\n</tool_call> tail',
    '<tool_call>{"name": "a", "arguments": {"t": "</tool_call>", "b": nul}}</tool_call> and ' + call(),
    '<tool_call>{"name": "a", "arguments": {"t": "\\u00</tool_call>"}}</tool_call> ' + call(),
    '<tool_call>{"name": "a", "arguments": {}} more</tool_call> ' + call(),
    "<tool_call>\nnonsense\n</tool_call>\n" + call() + " tail",
    call() + "\n<tool_call>\n{\"name\": \"cut",
    '{"name": "weather", "parameters": {"city": "Oslo"}}',
    '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]',
    '{"answer": 3}',
    "[1] is a source; " + call(),
    "",
]


def read(pieces, *options):
    reader, content, calls = ToolCallReader(*options), "", []
    for piece in [*pieces, None]:
        text, found = reader.finish() if piece is None else reader.push(piece)
        content, calls = content + text, calls + found
    assert reader.has_calls == bool(calls)
    return content, [each["function"] for each in calls], [each["id"] for each in calls]


@pytest.mark.parametrize("options", [(), (False,), (True, ["weather", "a"]), (False, ["time"])], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_give_what_the_whole_text_gives(text, options):
    content, expected = parse_tool_calls(text, *options)
    rng = random.Random(0)
    few = [sorted(rng.sample(range(len(text) + 1), min(5, len(text)))) for _ in range(20)]
    for cuts in ([], range(1, len(text)), *few):
        found, functions, ids = read([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], *options)
        assert (found, functions) == (content, [each["function"] for each in expected])
        assert len(set(ids)) == len(ids)


def test_content_is_not_held_back_longer_than_a_call_may_begin():
    reader = ToolCallReader()
    assert reader.push("It is a <b> tag ")[0] == "It is a <b> tag"
    assert reader.push("<tool") == ("", [])
    assert reader.push("box>") == (" <toolbox>", [])
    assert reader.push("\n\n" + call()[:-3]) == ("", [])
    [found] = reader.push(call()[-3:])[1]
    assert found["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert (found["type"], found["id"][:5]) == ("function", "call_")


@pytest.mark.parametrize("broken", ["nonsense", '{"name": "weather"}', '{"name": "x", "arguments": {}} and', "{1}"])
def test_after_a_malformed_call_text_is_streamed_on(broken):
    reader = ToolCallReader()
    said = f"<tool_call>{broken}</tool_call>"
    assert reader.push(f"{said} It is")[0] == f"{said} It is"
    assert reader.push(" warm.")[0] == " warm."


def test_only_calls_of_known_functions_are_calls_and_bare_ones_where_they_may_be():
    bare = '{"name": "weather", "arguments": {}}'
    for text, known, count in (
        (call(), None, 1), (call(), ["weather"], 1), (call(), ["time"], 0), (bare, ["weather"], 1), (bare, ["time"], 0),
    ):
        assert [len(parse_tool_calls(text, True, known)[1]), len(read([text], True, known)[1])] == [count, count]
    reader = ToolCallReader(bare=False)
    assert reader.push(bare) == (bare, []) and reader.finish() == ("", [])


def split(*events):
    async def stream():
        for event in events:
            yield dict(event)

    async def collect():
        return [event async for event in split_tool_calls(stream())]

    return asyncio.run(collect())


def test_answers_are_split_each_by_itself_and_only_where_they_may_call():
    start = {"fingerprint": "x", "prompt_tokens": 3, "functions": ["weather"], "bare_calls": True}
    half, rest = call()[:10], call()[10:]
    events = split(
        {**start, "index": 0, "may_call": True}, {**start, "index": 1, "may_call": False},
        {**start, "index": 2, "may_call": True},
        {"index": 0, "text": "Well. " + half, "tokens": 4}, {"index": 1, "text": call(), "tokens": 9},
        {"index": 2, "text": half, "tokens": 2},
        {"index": 0, "text": rest, "tokens": 5, "finish": "stop", "completion_tokens": 9},
        {"index": 1, "finish": "stop", "completion_tokens": 9},
        {"index": 2, "finish": "length", "completion_tokens": 2},
    )
    assert events[3] == {"index": 0, "text": "Well.", "tokens": 4}
    assert events[4] == {"index": 1, "text": call(), "tokens": 9}, "it had no tools"
    assert events[5] == {"index": 2, "tokens": 2}
    [found] = events[6].pop("tool_calls")
    assert found["function"]["name"] == "weather"
    assert events[6] == {"index": 0, "tokens": 5, "finish": "tool_calls", "completion_tokens": 9}
    assert events[7]["finish"] == "stop"
    assert events[8] == {"index": 2, "text": half, "finish": "length", "completion_tokens": 2}
    assert sum(event.get("tokens", 0) for event in events) == 20
