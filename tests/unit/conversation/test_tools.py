"""Tool definitions as text beside a system message, and back."""

import json
import time

import pytest

from pi_ray.conversation import check_tools, join_tools, split_tools
from pi_ray.conversation.messages import MAX_NESTING
from pi_ray.conversation.tools import AFTER, BEFORE

FIND = {"type": "function", "function": {
    "name": "find", "description": "Finds an order.\nBy <id>.", "parameters": {"type": "object", "properties": {}},
}}
STOP = {"type": "function", "function": {"name": "stop"}}


@pytest.mark.parametrize("system", ["", "Be brief.", "# Tools\n\nNone so far.\n\n## More"])
@pytest.mark.parametrize("tools", [[], [STOP], [FIND, STOP]])
def test_system_and_tools_are_read_back(system, tools):
    check_tools(tools)
    assert split_tools(join_tools(system, tools)) == (system, tools)


def test_the_text_is_what_qwen_and_hermes_models_know():
    text = join_tools("Be brief.", [STOP])
    assert text.startswith("Be brief.\n\n# Tools\n\nYou may call one or more functions")
    assert '<tools>\n{"type": "function", "function": {"name": "stop"}}\n</tools>' in text


@pytest.mark.parametrize("lines", ['{"type": "function', "1", "{}", '{"type": "function"}', "", "[" * 100_000])
def test_a_text_that_only_resembles_tools_has_none(lines):
    text = f"Be brief.\n\n{BEFORE}{lines}{AFTER}"
    assert split_tools(text) == (text, [])


def test_a_text_that_begins_tools_again_and_again_is_read_once():
    text, begin = f"\n\n{BEFORE}" * 10_000, time.perf_counter()
    assert split_tools(text) == (text, []) and time.perf_counter() - begin < 1


@pytest.mark.parametrize(("tools", "reason"), [
    ({}, "must be a list"),
    ([{"name": "f"}], r"tools\[0\] must be"),
    ([{"type": "function", "function": {"name": " "}}], r"tools\[0\] must be"),
    ([STOP, STOP], "a function 'stop' already"),
    ([{"type": "function", "function": {"name": "f", "description": "\ud83d"}}], "surrogate"),
    ([{"type": "function", "function": {"name": "f", "parameters": {"maximum": float("inf")}}}], "beyond the larg"),
    ([{"type": "function", "function": {"name": "f", "parameters": []}}], "must be a JSON schema"),
    ([{"type": "function", "function": {"name": "f", "parameters": {"a": json.loads("[" * 100 + "]" * 100)}}}], "deep"),
])
def test_bad_tools_are_refused_with_the_reason(tools, reason):
    with pytest.raises(ValueError, match=reason):
        check_tools(tools)


def test_as_many_levels_as_are_allowed_are_taken():
    def tool(levels):
        parameters: dict = {}
        for _ in range(levels - 3):  # beside the tool itself, its function and the parameters
            parameters = {"properties": parameters}
        return {"type": "function", "function": {"name": "f", "parameters": parameters}}

    check_tools([tool(MAX_NESTING)])
    with pytest.raises(ValueError, match="deep"):
        check_tools([tool(MAX_NESTING + 1)])
