"""Calls are compared by name and arguments as trees, in any order, normalised as BFCL does."""

import json

import pytest

from pi_ray.conversation import render_tool_calls
from tests.unit.metrics.scores import check, score


def calls(*named, text=""):
    made = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in named]
    return f"{text}\n{render_tool_calls(made)}".strip()


BOOK = ("book", {"day": "April 1, 2024", "seats": 2, "who": {"name": "Ann", "bags": [1, 2]}})


def test_order_of_calls_and_arguments_and_text_beside_them_do_not_count():
    other = ("cancel", {"id": "x"})
    again = ("book", dict(reversed(BOOK[1].items())))
    assert score("tool_call", calls(BOOK, other), calls(other, again, text="Let me see."), calls(BOOK)) == [1, 0]
    assert score("tool_call", calls(BOOK, BOOK), calls(BOOK, BOOK), calls(BOOK), calls(BOOK, other)) == [1, 0, 0]


@pytest.mark.parametrize("key, value, right", [
    ("day", "april 1 2024", 1), ("day", "April-1_2024", 1), ("day", "April 2, 2024", 0), ("seats", 2.0, 1),
    ("seats", "2", 0), ("seats", True, 0), ("seats", None, 0), ("who", {"bags": [1, 2], "name": "ANN"}, 1),
    ("who", {"name": "Ann", "bags": [2, 1]}, 0), ("who", {"name": "Ann"}, 0), ("who", [], 0), ("more", 1, 0),
    ("more", None, 1),
])  # fmt: skip
def test_arguments_are_normalised_as_the_leaderboard_does(key, value, right):
    assert score("tool_call", calls(BOOK), calls(("book", {**BOOK[1], key: value}))) == [right]


def test_quotes_and_dots_in_names():
    assert score("tool_call", calls(("api.say", {"t": "it's"})), calls(("api_say", {"t": 'it"s'}))) == [1]
    assert score("tool_call", calls(BOOK), calls(("Book", BOOK[1]))) == [0], "names have case"


def test_bare_json_is_a_call_too():
    assert score("tool_call", calls(("f", {"a": 1})), '{"name": "f", "parameters": {"a": 1}}') == [1]


@pytest.mark.parametrize("output", [
    "", "I cannot do that.", "<tool_call>", '<tool_call>\n{"name": "book", "arguments": {"day"\n</tool_call>',
    '<tool_call>\n{"name": "book", "arguments": "x"}\n</tool_call>', "<tool_call>\n" + "[" * 50_000,
    '<tool_call>\n{"name": "book", "arguments": {"a": NaN}}\n</tool_call>',
    '<tool_call>\n{"name": "book", "arguments": ' + '{"a": ' * 900 + "1" + "}" * 901 + "\n</tool_call>",
])  # fmt: skip
def test_what_is_no_call_or_a_broken_one_scores_nothing(output):
    assert score("tool_call", calls(BOOK), output) == [0]


def test_a_row_without_a_call_wants_none_or_is_scored_otherwise():
    assert score("tool_call", "Fine.", "Whatever", "", calls(BOOK), "<tool_call>{") == [1, 1, 0, 0]
    by_text = {"name": "tool_call", "otherwise": "f1"}
    assert score(by_text, "all is fine", "all is", "", calls(BOOK), calls(BOOK, text="all is fine")) == [0.8, 0, 0, 0]
    assert score(by_text, calls(BOOK), calls(BOOK), "book") == [1, 0]


def test_an_answer_with_a_broken_call_is_refused():
    assert "cannot be read" in check("tool_call", '<tool_call>\n{"name": 3}\n</tool_call>')
