"""JSON: the share of the answer's fields that the output has with the same values, or 0 where a schema is not met."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import regex
from jsonschema import Draft202012Validator, exceptions, validators
from referencing import Registry
from referencing.exceptions import Unresolvable

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.errors import ConfigError, DataError
from pi_ray.protocols import Row

PATTERN_SECONDS = 1.0  # of a schema's pattern on one text; then the text does not follow it
FENCE = regex.compile(r"\s*```(?:json)?[ \t]*\r?\n(.*?)\r?\n?```\s*", regex.S | regex.I)

Leaves = dict[tuple[str | int, ...], tuple[str, Any]]  # path -> (kind, value) of what holds nothing more


def parse_json_answer(text: str) -> Any:
    """The value of JSON text, which may stand in a code fence. Raises ValueError, also for NaN and endless nesting."""
    fenced = FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def find_leaves(value: Any) -> Leaves:
    """All texts, numbers, truth values, nulls, and empty lists and objects in a value. 1 is 1.0, and not true."""
    found: Leaves = {}
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while todo:
        path, item = todo.pop()
        if isinstance(item, (dict, list)) and item:
            inner = item.items() if isinstance(item, dict) else enumerate(item)
            todo += [((*path, key), one) for key, one in inner]
        else:
            is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
            found[path] = ("number" if is_number else type(item).__name__, item if item != [] and item != {} else None)
    return found


class JsonFields:
    """Each of `fields` that output or answer has counts as one; without `fields`, each of their leaves does.

    So inventing costs too, and a field that neither has is no point for free.
    """

    def __init__(self, config: MetricConfig, task: TaskConfig):
        self.fields = [tuple(field.split(".")) for field in config.fields]
        if not all(map(all, self.fields)):
            raise ConfigError("task.metric json: fields are names with dots between them, such as address.city")
        self.schema = _load_schema(Path(config.file)) if config.file else None

    def check(self, row: Row) -> str:
        try:
            answer = parse_json_answer(row.answer)
            reason = self._broken(answer) or self._lacking(find_leaves(answer))
        except ValueError as error:
            reason = f"it is no JSON ({error})"
        return f"its answer does not fit task.metric json: {reason}" if reason else ""

    def score(self, row: Row, output: str) -> float:
        try:
            wanted = find_leaves(parse_json_answer(row.answer))
        except ValueError:
            raise DataError(f"row '{row.id}': {self.check(row)}") from None
        try:
            value = parse_json_answer(output)
        except ValueError:
            return 0.0
        if self._broken(value):
            return 0.0
        found = find_leaves(value)
        if self.fields:
            pairs = [(_below(found, field), _below(wanted, field)) for field in self.fields]
            there = [ours == theirs for ours, theirs in pairs if ours or theirs]
            return sum(there) / len(there) if there else 1.0
        return sum(found.get(path) == leaf for path, leaf in wanted.items()) / len(wanted.keys() | found.keys())

    def _lacking(self, leaves: Leaves) -> str:
        """Why an answer cannot be scored by the fields, such as mistyped ones; "" where it can, or says nothing."""
        nothing = leaves.get(()) in (("dict", None), ("list", None))
        if not self.fields or nothing or any(_below(leaves, field) for field in self.fields):
            return ""
        return f"it has none of the fields ({', '.join(map('.'.join, self.fields))})"

    def _broken(self, value: Any) -> str:
        """Why a value does not follow the schema; "" where it does, or there is none."""
        if self.schema is None:
            return ""
        try:
            error = next(self.schema.iter_errors(value), None)
        except (RecursionError, ArithmeticError):
            return "too deep, or its numbers too large, for the schema"
        except Unresolvable as missing:
            raise ConfigError(f"task.metric json: the schema refers to {missing.ref}, which it does not hold; nothing "
                "is fetched, so put it under $defs") from None
        return error.message[:200] if error else ""


def _below(leaves: Leaves, field: tuple[str, ...]) -> Leaves:
    """The leaves of one field; none where it is missing."""
    return {path: leaf for path, leaf in leaves.items() if tuple(map(str, path[: len(field)])) == field}


def _load_schema(path: Path) -> Any:
    """The validator of a schema file. Raises ConfigError where it is none."""
    where = f"task.metric json: {path}"
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
        validator = validators.validator_for(schema, default=Draft202012Validator)
        validator.check_schema(schema)
    except OSError:
        raise ConfigError(f"{where}: no such file; put the JSON Schema there") from None
    except (ValueError, RecursionError, exceptions.SchemaError) as error:
        reason = error.message if isinstance(error, exceptions.SchemaError) else error
        raise ConfigError(f"{where}: not a JSON Schema: {reason}") from None
    if "patternProperties" in str(schema):
        raise ConfigError(f"{where}: patternProperties is not supported, since nothing limits the time that its "
            "patterns take; name the properties")
    limited = validators.extend(validator, {"pattern": _match_pattern})
    return limited(schema, registry=Registry())  # without one that fetches


def _match_pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[exceptions.ValidationError]:
    """The keyword `pattern`, with a time limit."""
    if isinstance(value, str):
        try:
            found = regex.search(pattern, value, timeout=PATTERN_SECONDS)
        except TimeoutError:
            found = None
        if not found:
            yield exceptions.ValidationError(f"{value!r} does not match {pattern!r}")
