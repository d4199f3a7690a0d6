"""Grammars for constrained decoding: the JSON schema of an answer, or the tools that it may call -> what it may say.

A grammar is a text in llguidance's dialect of Lark, so that every engine can take it: matcher.py compiles it for ours,
vLLM does by the same library, which names the keywords of a schema that it does not support.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from pi_ray.conversation.tool_calls import END, START
from pi_ray.serve.engine.refusal import RefusedError

MAX_GRAMMAR = 1 << 18  # characters
MAX_CALLS = 16  # in an answer that is nothing but calls
CHECKED_SCHEMAS = 256  # whose errors are remembered
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)
# A JSON answer may be indented as the model likes, but a weak one never ends white space; calls are as json.dumps
# writes them.
ANSWER_SPACE = {"whitespace_pattern": r"\n?[ \t]{0,32}"}
CALL_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
LENIENT = {"lenient": True, "coerce_one_of": True}  # keywords that are not supported do not count
TEXT = r"/(.|\n)*/"
ERROR_FRAME = re.compile(r"\Aat \d+\(\d+\): (failed to [^:]*: )?|\n +\d+ \| .*", re.DOTALL)  # about the grammar's text


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must be. Without `schema` it is text or calls of the request's tools."""

    schema: Mapping[str, Any] | None = None  # of an answer in JSON
    strict: bool = True  # False: `schema` is followed as far as its keywords are supported
    tool_choice: str = "auto"  # none, auto or required
    function: str = ""  # the one that must be called, where calls are required; "": any
    parallel_calls: bool = True


FREE_ANSWER = AnswerFormat()


def answer_grammar(answer: AnswerFormat, tools: Sequence[Mapping[str, Any]]) -> str:
    """The grammar of an answer; "" where it is free. Raises RefusedError for a schema that cannot be followed.

    Where the model may choose between text and calls it is free, unless one of the tools is strict or it may call once.
    """
    functions = [tool["function"] for tool in tools if answer.function in ("", tool["function"]["name"])]
    held = not answer.parallel_calls or any(function.get("strict") for function in functions)
    rules: dict[str, str] = {}
    if answer.schema is not None and answer.tool_choice != "required":
        options = ANSWER_SPACE if answer.strict else {**ANSWER_SPACE, **LENIENT}
        rules = {"start": "json", "json": _json_rule(answer.schema, options, "response_format")}
    if functions and answer.tool_choice == "none":
        rules = rules or {"start": "TEXT", "TEXT": rf"{TEXT} & ~/(.|\n)*{START}(.|\n)*/"}
    elif functions and (rules or answer.tool_choice == "required"):
        several = answer.parallel_calls and not answer.function
        calls = rf'call ("\n" call){{0,{MAX_CALLS - 1}}}' if several else "call"
        rules |= {"start": "json | calls" if rules else "calls", "calls": calls, "call": f"{_quote(START)} body"}
        rules |= _function_rules(functions)
    elif functions and held:
        start = "call* TEXT" if answer.parallel_calls else "call | TEXT"
        rules = {"start": start, "call": "mark body", "mark[lazy]": f"TEXT {_quote(START)}", "TEXT": TEXT}
        rules |= _function_rules(functions)
    grammar = "".join(f"{name}: {rule}\n" for name, rule in rules.items())
    if len(grammar) > MAX_GRAMMAR:
        size = f"JSON schemas of {len(grammar)} characters together; at most {MAX_GRAMMAR} can be followed"
        raise RefusedError(400, f"the request has {size}", param="tools" if functions else "response_format")
    return grammar


def _function_rules(functions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """`body`: a call behind its first mark, as conversation.render_tool_calls writes it."""
    rules = {}
    for i, function in enumerate(functions):
        parameters = {"type": "object", **(function.get("parameters") or {"additionalProperties": False})}
        options = CALL_SPACE if function.get("strict") else {**CALL_SPACE, **LENIENT}
        arguments = _json_rule(parameters, options, "tools", f"the parameters of {function['name']}: ")
        rules[f"function_{i}"] = f"{_quote(_quote(function['name']) + ', ' + _quote('arguments') + ': ')} {arguments}"
    start, end = _quote('\n{"name": '), _quote(f"}}\n{END}")
    return {"body": f"{start} ({' | '.join(rules)}) {end}", **rules}


def _json_rule(schema: Mapping[str, Any], options: Mapping[str, Any], param: str, place: str = "") -> str:
    rule = f"%json {json.dumps({**schema, 'x-guidance': options})}"
    if len(rule) <= MAX_GRAMMAR and (error := _schema_error(rule)):
        message = f"{place}this JSON schema cannot be followed: {error}"
        raise RefusedError(400, message, code="invalid_json_schema", param=param)
    return rule


@lru_cache(CHECKED_SCHEMAS)
def _schema_error(rule: str) -> str:
    """Why no answer can be held to the schema; "" where one can."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(f"start: {rule}", limits=LIMITS)
    return " ".join(ERROR_FRAME.sub("", messages[0]).split()) if is_error else ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
