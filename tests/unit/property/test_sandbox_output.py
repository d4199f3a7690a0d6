"""What a program in the sandbox may write in place of its values: anything; a verdict comes out, and never "passed"
for a value that was not computed.
"""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from pi_ray.tasks.sandbox.harness import encode_value
from pi_ray.tasks.sandbox.judge import Step, judge_answer, read_values
from tests.unit.property.strategies import changed, json_values

STEPS = [Step("value", "f(3)", [1, 2]), Step("truth", "f(3)")]
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner), max_leaves=10,
)


def answer(*values, error=""):
    return [encode_value(error), [encode_value(value) for value in values]]


@given(st.binary() | json_values().map(lambda v: json.dumps(v).encode()))
@example(b"[" * 100_000)
@example(json.dumps([["str", ""], [["list", [["int", "1"]]], ["other", ""]]]).encode())
@example(json.dumps([["str", ""], [["int", "f" * 100_000], ["const", "True"]]]).encode())
@example(json.dumps([["str", ""], [["ratio", "1", "0"], ["dict", [[["list", []], ["int", "1"]]]]]]).encode())
def test_any_output_gets_a_verdict_and_does_not_pass(line):
    assert judge_answer(STEPS, line).startswith(("failed", "raised"))
    values, why = read_values(line)
    assert isinstance(values, list) and isinstance(why, str)


@given(changed(answer([1, 2], True)))
def test_a_forged_answer_passes_only_with_the_values(content):
    verdict = judge_answer(STEPS, json.dumps(content).encode())
    assert verdict.startswith(("failed", "raised", "passed"))
    if verdict == "passed":
        values, why = read_values(json.dumps(content).encode())
        assert values == [[1, 2], True] and not why


@given(plain)
def test_plain_values_come_out_as_they_went_in(value):
    line = json.dumps(answer(value)).encode()
    assert read_values(line) == ([value], "")
    assert judge_answer([Step("value", "x", value)], line) == "passed"
