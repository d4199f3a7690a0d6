"""Grammars for constrained decoding: the JSON schema of an answer, or the tools that it may call -> what it may say.

A grammar is a text in llguidance's dialect of Lark, so that every engine can take it: matcher.py compiles it for ours,
vLLM does by the same library, which names the keywords of a schema that it does not support.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from pi_ray.cluster.requirements import installed_version, is_older
from pi_ray.conversation.tool_calls import END, START
from pi_ray.serve.engine.refusal import RefusedError

MAX_GRAMMAR = 1 << 18  # characters
MAX_CALLS = 16  # in an answer that is nothing but calls
CHECKED_SCHEMAS = 256  # whose errors are remembered
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False)
# Calls are as json.dumps writes them. A JSON answer may be indented as the model likes, but a weak one never ends white
# space; below 1.8 llguidance repeats the pattern without end, so that there it is as json.dumps writes it too.
CALL_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ENDLESS_SPACE = is_older(installed_version("llguidance"), "1.8")
ANSWER_SPACE = CALL_SPACE if ENDLESS_SPACE else {"whitespace_pattern": r"\n?[ \t]{0,32}"}
LENIENT = {"lenient": True, "coerce_one_of": True}  # keywords that are not supported do not count
TEXT = r"/(.|\n)*/"
TEXT_WITHOUT_CALL = rf"{TEXT} & ~/(.|\n)*{START}(.|\n)*/"
NO_TOKENS: Mapping[str, int] = MappingProxyType({})
ERROR_FRAME = re.compile(r"\Aat \d+\(\d+\): (failed to [^:]*: )?|\n +\d+ \| .*", re.DOTALL)  # about the grammar's text


@dataclass(frozen=True)
class AnswerFormat:
    """The form that an answer must have. Without `schema` it is text or calls of the request's tools."""

    schema: Mapping[str, Any] | None = None  # of an answer in JSON
    strict: bool = True  # False: `schema` is followed as far as its keywords are supported
    tool_choice: str = "auto"  # none, auto or required
    function: str = ""  # the one that must be called, where calls are required; "": any
    parallel_calls: bool = True


FREE_ANSWER = AnswerFormat()


def answer_grammar(
    answer: AnswerFormat, tools: Sequence[Mapping[str, Any]], added_tokens: Mapping[str, int] = NO_TOKENS
) -> str:
    """The grammar of an answer; "" where it is free. Raises RefusedError for a schema that cannot be followed.

    `added_tokens` (text -> id) are those of the tokenizer that are not special. Quoted text never matches one of form
    <...>, so a mark of calls that is an added token stands in the grammar by its name, others of free text by their id.
    Where the model may choose between text and calls it is free, unless one of the tools is strict or it may call once.
    """
    functions = [tool["function"] for tool in tools if answer.function in ("", tool["function"]["name"])]
    held = not answer.parallel_calls or any(function.get("strict") for function in functions)
    first, last = (mark if mark in added_tokens else _quote(mark) for mark in (START, END))
    others = ",".join(str(token) for text, token in added_tokens.items() if text not in (START, END))
    between = f"(TEXT <[{others}]>)*" if others else ""  # free text up to the last of such tokens
    rules: dict[str, str] = {}
    if answer.schema is not None and answer.tool_choice != "required":
        options = ANSWER_SPACE if answer.strict else {**ANSWER_SPACE, **LENIENT}
        rules = {"start": "json", "json": _json_rule(answer.schema, options, "response_format")}
    if functions and answer.tool_choice == "none":
        rules = rules or {"start": f"{between} TEXT", "TEXT": TEXT_WITHOUT_CALL}
    elif functions and (rules or answer.tool_choice == "required"):
        several = answer.parallel_calls and not answer.function
        calls = rf'call ("\n" call){{0,{MAX_CALLS - 1}}}' if several else "call"
        rules |= {"start": "json | calls" if rules else "calls", "calls": calls, "call": f"{first} body"}
        rules |= _function_rules(functions, last)
    elif functions and held:
        start = "call* text" if answer.parallel_calls else "call | text"
        rules = {"start": start, "text": f"{between} TEXT", "call": f"{between} mark body"}
        if START in added_tokens:
            rules |= {"mark": f"TEXT {first}", "TEXT": TEXT_WITHOUT_CALL}
        else:
            rules |= {"mark[lazy]": f"TEXT {first}", "TEXT": TEXT}
        rules |= _function_rules(functions, last)
    grammar = "".join(f"{name}: {rule}\n" for name, rule in rules.items())
    if len(grammar) > MAX_GRAMMAR:
        size = f"JSON schemas of {len(grammar)} characters together; at most {MAX_GRAMMAR} can be followed"
        raise RefusedError(400, f"the request has {size}", param="tools" if functions else "response_format")
    return grammar


def _function_rules(functions: Sequence[Mapping[str, Any]], last: str) -> dict[str, str]:
    """`body`: a call behind its first mark and up to the `last`, as conversation.render_tool_calls writes it."""
    rules = {}
    for i, function in enumerate(functions):
        parameters = function.get("parameters") or {"additionalProperties": False}
        kind = parameters.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            message = f"the parameters of {function['name']} must be a JSON schema of type object"
            raise RefusedError(400, message, code="invalid_json_schema", param="tools")
        options = CALL_SPACE if function.get("strict") else {**CALL_SPACE, **LENIENT}
        place = f"the parameters of {function['name']}: "
        arguments = _json_rule({**parameters, "type": "object"}, options, "tools", place)
        rules[f"function_{i}"] = f"{_quote(_quote(function['name']) + ', ' + _quote('arguments') + ': ')} {arguments}"
    start, end = _quote('\n{"name": '), _quote("}\n") + f" {last}"
    return {"body": f"{start} ({' | '.join(rules)}) {end}", **rules}


def _json_rule(schema: Mapping[str, Any], options: Mapping[str, Any], param: str, place: str = "") -> str:
    rule = f"%json {json.dumps({**schema, 'x-guidance': options})}"
    with _check_lock:  # choices of one request wait for the same schema, and find it checked
        error = _schema_error(rule) if len(rule) <= MAX_GRAMMAR else ""
    if error:
        message = f"{place}this JSON schema cannot be followed: {error}"
        raise RefusedError(400, message, code="invalid_json_schema", param=param)
    return rule


_check_lock = threading.Lock()


@lru_cache(CHECKED_SCHEMAS)
def _schema_error(rule: str) -> str:
    """Why no answer can be held to the schema; "" where one can."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(f"start: {rule}", limits=LIMITS)
    return " ".join(ERROR_FRAME.sub("", messages[0]).split()) if is_error else ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
