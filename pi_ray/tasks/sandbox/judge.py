"""Verdicts: the sandbox evaluates one side of an assert, this trusted process compares the value with the other.

`assert f(3) == [1, 2]` becomes "evaluate f(3)" inside, and a comparison with [1, 2] here. The expected value never goes
in, so that no exit code, patched builtin, `__eq__`, stack frame or forged output passes a test: a program must compute
the value, or know it from the prompt. The output is data in a format of its own, read without running anything.

Left open: an assert that is not `... == <literal>` is evaluated inside as a whole, and a program that takes over its
own process can claim that it held. MBPP has 3 of this kind in 2,922, all in task 596.
"""

import ast
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pi_ray.errors import DataError


@dataclass(frozen=True)
class Step:
    """One piece to run: kind "exec" (a statement), "value" (must equal `expected`) or "truth" (must be true)."""

    kind: str
    source: str
    expected: Any = None


def split_tests(tests: Sequence[str]) -> list[Step]:
    """Test statements -> steps. Raises DataError when a test is not Python, or when nothing is asserted."""
    try:
        steps = [_step(statement) for test in tests for statement in ast.parse(test.strip()).body]
    except (SyntaxError, ValueError) as error:
        raise DataError(f"a test is not valid Python ({error}): {' '.join(tests)[:200]}") from None
    if all(step.kind == "exec" for step in steps):
        raise DataError("a program without asserts proves nothing; give it at least one test")
    return steps


def _step(statement: ast.stmt) -> Step:
    if not isinstance(statement, ast.Assert):
        return Step("exec", ast.unparse(statement))
    test = statement.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        with suppress(ValueError, TypeError):  # not a literal
            return Step("value", ast.unparse(test.left), ast.literal_eval(test.comparators[0]))
    return Step("truth", ast.unparse(test))


def judge_answer(steps: Sequence[Step], line: bytes) -> str:
    """ "passed", or the reason why not. `line` is the sandbox's output; it may be anything."""
    try:
        error, values = json.loads(line)
        found = [_decode(value) for value in values]
        for number, (step, value) in enumerate(zip(steps, found, strict=False), start=1):
            if (step.kind == "value" and value != step.expected) or (step.kind == "truth" and value is not True):
                return f"failed: test {number}"
        if name := _decode(error):
            return f"raised {name[:80] if name.isidentifier() else 'an exception'}"
        return "passed" if len(found) == len(steps) else "failed: not all tests answered"
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        return "failed: no readable answer"


def read_values(line: bytes) -> tuple[list[Any], str]:
    """(the values of the steps that ran, what ended them or ""). `line` is as for `judge_answer`."""
    try:
        error, values = json.loads(line)
        found, name = [_decode(value) for value in values], _decode(error)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        return [], "gave no readable answer"
    return found, f"raised {name[:80] if name.isidentifier() else 'an exception'}" if name else ""


def _decode(data: list[Any]) -> Any:
    """The inverse of harness.encode_value; other data becomes an object that equals nothing. Raises ValueError etc."""
    kind, content, *rest = data
    if kind in ("list", "tuple", "set", "frozenset"):
        items = [_decode(item) for item in content]
        # a set inside a set can only have been a frozenset, and the two compare equal
        return items if kind == "list" else tuple(items) if kind == "tuple" else frozenset(items)
    if kind == "dict":
        return {_decode(key): _decode(value) for key, value in content}
    return {
        "const": lambda: {"None": None, "True": True, "False": False}[content],
        "int": lambda: int(content, 16),
        "float": lambda: float.fromhex(content),
        "complex": lambda: complex(float.fromhex(content), float.fromhex(rest[0])),
        "str": lambda: bytes.fromhex(content).decode("utf-8", "surrogatepass"),
        "bytes": lambda: bytes.fromhex(content),
        "ratio": lambda: Fraction(int(content, 16), int(rest[0], 16)),
        "other": object,
    }[kind]()
