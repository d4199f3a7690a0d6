"""Asserts are split, values cross as data, and nothing but the right value passes. No program is run here."""

import json
import sys
from collections import Counter, OrderedDict, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest

from pi_ray.errors import DataError
from pi_ray.tasks.sandbox.harness import encode_value, run_steps
from pi_ray.tasks.sandbox.judge import Step, judge_answer, split_tests

Point = namedtuple("Point", "x y")


@pytest.fixture(autouse=True)
def own_main(monkeypatch):
    """The harness puts the program in the place of `__main__`; here it is put back."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


def sent(values, error=""):
    """The line that the harness writes."""
    return repr([encode_value(error), [encode_value(value) for value in values]]).replace("'", '"').encode()


def judged(value, expected):
    return judge_answer([Step("value", "f()", expected)], sent([value]))


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -255, 10**5000, 1.5, float("inf"), -0.0, 2 + 3j, "", "é\ud800\n'\"", b"\x00'", [],
        [1, [2, (3,)]], (), (None,), set(), {1, "a"}, frozenset({2}), {"a": [1.0], (1, 2): {"b": {3}}},
        {frozenset({1}): 2}, bytearray(b"x"), {1: 2}.keys(), Fraction(1, 3), Decimal("0.1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_data_crosses_unchanged(value):
    assert judged(value, value) == "passed" and judged(value, object()) == "failed: test 1"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, True), (1.0, 1), ([1], (1,)), ("1", 1), (Counter("aab"), {"a": 2, "b": 1}), (OrderedDict(a=1), {"a": 1}),
        (Point(1, 2), (1, 2)), (Fraction(1, 2), 0.5), (Decimal("0.1"), 0.1), (frozenset({1}), {1}),
        ({1: 2}.items(), {(1, 2)}), ({1: 2}.values(), [2]), (range(2), [0, 1]), (iter([1]), [1]),
    ],
)
def test_values_compare_as_python_compares_them(value, expected):
    assert (judged(value, expected) == "passed") == (value == expected)


class Always(int):
    __eq__ = lambda self, other: True  # noqa: E731
    __hash__ = int.__hash__


class Alike:
    __eq__ = Always.__eq__
    __hash__ = None


@pytest.mark.parametrize("value", [Always(3), Alike(), [Alike()], {1: Alike()}, print, type, float("nan")])
def test_an_object_that_says_it_is_equal_is_not(value):
    assert judged(value, 4) == judged(value, [4]) == "failed: test 1"


def test_a_value_within_itself_is_an_answer_and_a_wrong_one():
    loop = []
    loop.append(loop)
    assert judged(loop, [1]) == "failed: test 1"


@pytest.mark.parametrize(
    "line",
    [
        b"", b"null", b"[]", b"{}", b"[1, 2]", b'["", []]', b'[["str",""],[[]]]', b'[["str",""],[["nonsense",""]]]',
        b'[["str",""],[["int"]]]', b'[["str",""],[["int","2f",1]]] junk', b'[["str",""],[["ratio","1","0"]]]',
        b'[["str",""],[["dict",[[["list",[]],["int","1"]]]]]]', b'[["str",""],[["float","0x1p+99999"]]]', b"[" * 50_000,
        b"\xff\xfe", b'[["str",""],' + b'[["list",' * 20_000 + b"[]" + b"]]" * 20_000 + b"]", b'[["str",""],[]]',
        b'[["str",""],[["const","True"]]]', b'[["str",""],[["int","29"]]]' * 2,
    ],
    ids=range(19),
)
def test_a_forged_line_never_passes_and_never_raises(line):
    assert judge_answer([Step("value", "f()", 41)], line) != "passed"


def test_the_expected_value_stays_outside():
    steps = split_tests(
        [
            "assert f(1) == [2, 3]", "assert f(2) == (-1.5, None, {'a'})", "x = f(3)", "assert x", "assert x == g()",
            "assert f(4) != 5",
        ]
    )
    assert [(s.kind, s.source, s.expected) for s in steps] == [
        ("value", "f(1)", [2, 3]), ("value", "f(2)", (-1.5, None, {"a"})), ("exec", "x = f(3)", None),
        ("truth", "x", None), ("truth", "x == g()", None), ("truth", "f(4) != 5", None),
    ]


@pytest.mark.parametrize("tests", [[], ["x = 1"], ["assert f( =="], ["assert '\0'"]])
def test_tests_that_prove_nothing_are_refused(tests):
    with pytest.raises(DataError, match=r"assert|not valid Python"):
        split_tests(tests)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(x): return x + 1", "passed"), ("def f(x): return x", "failed: test 1"),
        ("def f(x): return 2", "failed: test 2"), ("def g(): pass", "raised NameError"),
        ("def f(x): return x +", "raised SyntaxError"), ("raise SystemExit(0)", "raised SystemExit"),
        ("def f(x): raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("def f(x): return x + 1 if x < 2 else 1 / 0", "raised ZeroDivisionError"),
        ("class Odd(Exception): pass\nOdd.__name__ = '<b>'\nraise Odd", "raised an exception"),
    ],
)
def test_the_harness_says_what_happened(code, reason):
    steps = split_tests(["assert f(1) == 2", "assert f(2) == 3"])
    error, values = run_steps((code, ""), [(s.kind, s.source) for s in steps])
    assert judge_answer(steps, json.dumps([error, values]).encode()) == reason


def test_code_then_set_up_then_tests():
    error, values = run_steps(
        ("class Node:\n    value = 1", "root = Node()"),
        [("value", "root.value"), ("truth", "root"), ("value", "__name__")],
    )
    assert (error, values) == (encode_value(""), [encode_value(1), encode_value(True), encode_value("__main__")])


def test_a_value_is_taken_when_it_is_returned():
    _, values = run_steps(
        ("seen = []\ndef f(x):\n    seen.append(x)\n    return seen",), [("value", "f(1)"), ("value", "f(2)")]
    )
    assert values == [encode_value([1]), encode_value([1, 2])]
