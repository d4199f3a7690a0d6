"""Grammars of constrained decoding: what an answer may be, in a request's words, and which schemas are refused."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AddedToken

from pi_ray.config import ModelConfig
from pi_ray.conversation import render_tool_calls
from pi_ray.models import load_tokenizer
from pi_ray.serve.engine import grammar
from pi_ray.serve.engine.grammar import FREE_ANSWER, AnswerFormat, answer_grammar
from pi_ray.serve.engine.matcher import MatcherFactory
from pi_ray.serve.engine.refusal import RefusedError

SCHEMA = {
    "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"], "additionalProperties": False,
}
REQUIRED = AnswerFormat(tool_choice="required")
INDENTS = grammar.ANSWER_SPACE != grammar.CALL_SPACE  # from llguidance 1.8 on


def tool(name="weather", parameters=SCHEMA, **rest):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **rest}}


def call(name="weather", **arguments):
    return render_tool_calls([{"function": {"name": name, "arguments": json.dumps(arguments)}}])


@pytest.fixture(scope="module")
def may_say(tiny_model):
    """Whether an answer of this format may be a whole text."""
    tokenizer = load_tokenizer(ModelConfig(base=str(tiny_model)))
    matchers = MatcherFactory(tokenizer)

    def may_say(text, answer, *tools):
        matcher = matchers.matcher(answer_grammar(answer, tools))
        return matcher.consume_tokens(tokenizer(text).input_ids) and matcher.is_accepting()

    return may_say


def test_an_answer_is_free_unless_the_request_says_otherwise():
    assert answer_grammar(FREE_ANSWER, ()) == "" == answer_grammar(FREE_ANSWER, [tool(), tool("time")])


@pytest.mark.parametrize(("text", "fits"), [
    ('{"city": "Oslo", "days": 3}', True),
    ('{"city":"Rome"}', INDENTS),
    ('{\n  "city": "Rome"\n}', INDENTS),
    ('{"city": "Rome"', False),
    ('{"city": "Paris"}', False),
    ('{"days": 3}', False),
    ('{"city": "Rome", "sky": 1}', False),
    ('{"city": "Rome"} and more', False),
    ("Rome", False),
])  # fmt: skip
def test_a_json_answer_has_the_schema(may_say, text, fits):
    assert may_say(text, AnswerFormat(SCHEMA)) == fits


def test_any_json_object_is_one_whatever_it_nests(may_say):
    assert may_say('{"a": [1, {"b": null}], "c": "é\\n </tool_call>"}', AnswerFormat({"type": "object"}))
    assert not may_say("[1]", AnswerFormat({"type": "object"}))


@pytest.mark.skipif(not INDENTS, reason="this llguidance knows no bound, so that there is no such space")
def test_white_space_of_a_json_answer_has_an_end(may_say):
    assert may_say('{"city":\n' + " " * 32 + '"Rome"}', AnswerFormat(SCHEMA))
    assert not may_say('{"city":\n' + " " * 33 + '"Rome"}', AnswerFormat(SCHEMA))
    assert not may_say('{"city":\n\n"Rome"}', AnswerFormat(SCHEMA))


@pytest.mark.parametrize(("text", "fits"), [
    (call(city="Oslo"), True),
    (call(city="Oslo", days=2), True),
    (call("time"), True),
    (call(city="Oslo") + "\n" + call("time") + "\n" + call(city="Rome"), True),
    (call(city="Paris"), False),
    (call("time", city="Oslo"), False),
    (call("other"), False),
    ("I call it: " + call("time"), False),
    (call("time") + " done", False),
    (call("time")[:-1], False),
])  # fmt: skip
def test_calls_that_are_required_are_whole_ones_of_known_functions(may_say, text, fits):
    assert may_say(text, REQUIRED, tool(), tool("time", None)) == fits


def test_a_function_that_is_named_is_called_once(may_say):
    named = AnswerFormat(tool_choice="required", function="time")
    tools = tool(), tool("time", None)
    assert may_say(call("time"), named, *tools)
    assert not may_say(call(city="Oslo"), named, *tools)
    assert not may_say(call("time") + "\n" + call("time"), named, *tools)


def test_without_parallel_calls_there_is_one(may_say):
    one = AnswerFormat(tool_choice="required", parallel_calls=False)
    assert may_say(call(city="Oslo"), one, tool())
    assert not may_say(call(city="Oslo") + "\n" + call(city="Rome"), one, tool())
    auto = AnswerFormat(parallel_calls=False)
    assert may_say("no call", auto, tool()) and may_say("Well: " + call(city="Oslo"), auto, tool())
    assert not may_say(call(city="Oslo") + "\n" + call(city="Rome"), auto, tool())


def test_a_strict_tool_is_followed_where_the_model_may_choose(may_say):
    tools = tool(strict=True), tool("time", None)
    for text in ("It is warm.", "a < b", call(city="Oslo"), "Let me see.\n" + call("time") + "\n" + call(city="Rome")):
        assert may_say(text, FREE_ANSWER, *tools)
    assert not may_say("Let me see.\n" + call(city="Paris"), FREE_ANSWER, *tools)


def test_where_no_tool_may_be_called_none_is(may_say):
    none = AnswerFormat(tool_choice="none")
    assert may_say("It is warm, a <tool> says.", none, tool())
    assert not may_say("Well: " + call(city="Oslo"), none, tool())
    assert may_say('{"city": "Oslo"}', AnswerFormat(SCHEMA, tool_choice="none"), tool())


def test_with_a_schema_and_tools_the_answer_is_the_one_or_calls(may_say):
    both = AnswerFormat(SCHEMA)
    assert may_say('{"city": "Oslo"}', both, tool()) and may_say(call(city="Oslo"), both, tool())
    assert not may_say("warm", both, tool())
    assert not may_say('{"city": "Oslo"}', AnswerFormat(SCHEMA, tool_choice="required"), tool())


def test_arguments_are_an_object_also_where_their_schema_does_not_say_so(may_say):
    untyped = tool(parameters={"properties": {"city": {"type": "string"}}})
    assert may_say(call(city="Oslo"), REQUIRED, untyped)
    assert not may_say(call(city="Oslo").replace('{"city": "Oslo"}', '"Oslo"'), REQUIRED, untyped)


def test_arguments_are_never_null_and_parameters_of_another_type_are_refused(may_say):
    nullable = tool(parameters={**SCHEMA, "type": ["object", "null"]})
    assert may_say(call(city="Oslo"), REQUIRED, nullable)
    assert not may_say(call(city="Oslo").replace('{"city": "Oslo"}', "null"), REQUIRED, nullable)
    for kind in ("string", ["null", "array"], None):
        with pytest.raises(RefusedError, match="parameters of weather must be a JSON schema of type object") as refused:
            answer_grammar(REQUIRED, [tool(parameters={"type": kind})])
        assert (refused.value.status, refused.value.param) == (400, "tools")


MARKS = ("<tool_call>", "</tool_call>")
THOUGHT = "<think>Is it warm?</think> "


@pytest.mark.parametrize("added", [MARKS, (*MARKS, "<think>", "</think>"), ("<think>", "</think>")], ids=str)
def test_marks_and_thoughts_that_the_tokenizer_has_as_tokens_can_be_said(added):
    tokenizer = load_tokenizer(ModelConfig())
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    matchers, tools = MatcherFactory(tokenizer), (tool(strict=True), tool("time", None))
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in added}

    def may_say(text, answer):
        matcher, tokens = matchers.matcher(answer_grammar(answer, tools, ids)), tokenizer(text).input_ids
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    several = call(city="Oslo") + "\n" + call("time")
    one, none = AnswerFormat(parallel_calls=False), AnswerFormat(tool_choice="none")
    before = THOUGHT if "<think>" in added else "Well. "
    assert may_say(call(city="Oslo"), REQUIRED) and may_say(several, REQUIRED)
    assert not may_say(call(city="Paris"), REQUIRED) and not may_say(call("other"), REQUIRED)
    for text in ("It is warm.", before + "Warm.", before + call(city="Oslo"), before + several + " Now?", "a < b"):
        assert may_say(text, FREE_ANSWER), text
    for text in (call(city="Paris"), before + call("other"), before + several + call(city="Paris")):
        assert not may_say(text, FREE_ANSWER), text
    assert may_say(before + call(city="Oslo"), one) and may_say(before, one) and not may_say(several, one)
    assert may_say(before + "Warm.", none) and not may_say(before + call("time"), none)
    if MARKS[0] in added:
        spelled = [i for piece in ("<tool", "_call", ">", "{") for i in tokenizer(piece).input_ids]
        matcher = matchers.matcher(answer_grammar(FREE_ANSWER, tools, ids))
        assert matcher.try_consume_tokens(spelled) < len(spelled), "the mark as text would be a call too"


def test_names_and_references_stay_within_their_own_tool(may_say):
    def place(name):
        return {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"],
                "additionalProperties": False, "$defs": {"place": {"const": name}}}

    tools = tool('quo"te\\', place("here")), tool("tür", place("there"))
    assert may_say(call('quo"te\\', at="here"), REQUIRED, *tools) and may_say(call("tür", at="there"), REQUIRED, *tools)
    assert not may_say(call("tür", at="here"), REQUIRED, *tools)


@pytest.mark.parametrize(("schema", "says"), [
    ({"type": "object", "not": {"type": "null"}}, 'Unimplemented keys: ["not"]'),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "oneOf"),
    ({"type": "string", "format": "colour"}, "Unknown format: colour"),
    ({"type": "colour"}, "Invalid type: colour"),
    ({"$ref": "#/$defs/gone"}, "'/$defs/gone' does not exist"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum (3) is greater than maximum (1)"),
])  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(schema, says):
    with pytest.raises(RefusedError) as refused:
        answer_grammar(AnswerFormat(schema), ())
    assert (refused.value.status, refused.value.param) == (400, "response_format")
    assert says in refused.value.message and "%json" not in refused.value.message
    with pytest.raises(RefusedError) as refused:
        parameters = {"type": "object", "properties": {"colour": schema}, "required": ["colour"]}
        answer_grammar(FREE_ANSWER, [tool(), tool("paint", parameters, strict=True)])
    assert (refused.value.status, refused.value.param) == (400, "tools")
    assert "paint" in refused.value.message
    assert says in refused.value.message or "'colour' is unsatisfiable" in refused.value.message


def test_a_schema_that_many_threads_ask_for_at_once_is_checked_once(monkeypatch):
    checked, real = [], grammar.LLMatcher.validate_grammar_with_warnings

    class Counting:
        @staticmethod
        def validate_grammar_with_warnings(text, limits):
            checked.append(text)
            time.sleep(0.05)
            return real(text, limits=limits)

    monkeypatch.setattr(grammar, "LLMatcher", Counting)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: answer_grammar(AnswerFormat({"const": "asked at once"}), ()), range(8)))
    assert len(checked) == 1


def test_what_is_not_strict_is_followed_as_far_as_it_can_be(may_say):
    schema = {**SCHEMA, "not": {"type": "null"}}
    assert may_say('{"city": "Oslo"}', AnswerFormat(schema, strict=False))
    assert not may_say('{"city": "Paris"}', AnswerFormat(schema, strict=False))
    assert may_say(call(city="Oslo"), REQUIRED, tool(parameters=schema))
    assert not may_say(call(city="Paris"), REQUIRED, tool(parameters=schema))


def test_schemas_that_are_too_large_are_refused_with_both_numbers(monkeypatch):
    many = {"enum": [f"value {i}" for i in range(20_000)]}
    for answer, tools, param in (
        (AnswerFormat(many), (), "response_format"), (REQUIRED, [tool(parameters={**SCHEMA, **many})], "tools"),
    ):
        with pytest.raises(RefusedError, match=rf"at most {grammar.MAX_GRAMMAR} can") as refused:
            answer_grammar(answer, tools)
        assert (refused.value.status, refused.value.param) == (400, param)
    nested = {"type": "string"}
    for _ in range(200):
        nested = {"type": "object", "properties": {"a": nested}}
    with pytest.raises(RefusedError, match="recursion limit"):
        answer_grammar(AnswerFormat(nested), ())
