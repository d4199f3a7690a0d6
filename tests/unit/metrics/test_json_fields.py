"""JSON is compared field by field, and what breaks the schema scores nothing."""

import json
import time

import pytest

from pi_ray.config import TaskConfig
from pi_ray.errors import ConfigError, DataError
from pi_ray.metrics import RowScorer
from pi_ray.protocols import Row
from tests.unit.metrics.scores import check, score

ANSWER = '{"name": "Ann", "age": 3, "tags": ["a", "b"], "home": {"city": "Oslo"}, "extra": {}}'


def test_the_share_of_equal_leaves_of_both_counts():
    same = '{"age": 3.0, "home": {"city": "Oslo"}, "extra": {}, "tags": ["a", "b"], "name": "Ann"}'
    swapped = ANSWER.replace('["a", "b"]', '["b", "a"]')
    invented = ANSWER.replace('"age": 3', '"age": 3, "x": 1, "y": 2')
    assert score("json", ANSWER, ANSWER, same, swapped, invented, "{}", "[]") == [1, 1, 0.667, 0.75, 0, 0]


def test_kinds_are_not_mixed_up():
    assert score("json", '{"a": 1}', '{"a": true}', '{"a": "1"}', '{"a": 1.0}', '{"a": null}', '{"a": [1]}') == [
        0, 0, 1, 0, 0,
    ]
    assert score("json", "[]", "[]", "{}", "null", "0") == [1, 0, 0, 0]


def test_named_fields_count_alike_whatever_else_there_is():
    metric = {"name": "json", "fields": ["name", "home", "tags.1"]}
    assert score(metric, ANSWER, ANSWER, '{"name": "Ann", "x": 1}', '{"home": {"city": "Oslo"}, "tags": [0, "b"]}') == [
        1, 0.333, 0.667,
    ]
    metric = {"name": "json", "fields": ["name", "none"]}
    assert score(metric, ANSWER, ANSWER, '{"name": "Bo"}', '{"name": "Ann", "none": 1}') == [1, 0, 0.5], "not for free"
    assert score(metric, "{}", "{}", '{"name": "Ann"}') == [1, 0], "nothing was to be found"


def test_an_answer_without_any_of_the_fields_is_refused():
    mistyped = {"name": "json", "fields": ["nmae", "home.town"]}
    assert check(mistyped, ANSWER).endswith("it has none of the fields (nmae, home.town)")
    assert check(mistyped, "5") and not check(mistyped, "[]")


@pytest.mark.parametrize("output", [
    "", "no JSON", ANSWER[:-1], "NaN", '{"age": NaN}', "[" * 100_000, '{"a": ' * 5_000 + "1" + "}" * 5_000,
    "1" * 5_000, '"\\ud800"',
])  # fmt: skip
def test_what_is_no_json_or_something_else_scores_nothing_and_never_crashes(output):
    assert score("json", ANSWER, output) == [0]


def test_a_code_fence_may_stand_around_it():
    assert score("json", ANSWER, f"```json\n{ANSWER}\n```", f"```\n{ANSWER}\n```\n", f"Here: {ANSWER}") == [1, 1, 0]


@pytest.fixture
def with_schema(tmp_path):
    def write(schema):
        path = tmp_path / "schema.json"
        path.write_text(schema if isinstance(schema, str) else json.dumps(schema))
        return {"name": "json", "file": str(path)}

    return write


def test_what_breaks_the_schema_scores_nothing(with_schema):
    metric = with_schema({
        "type": "object", "required": ["age"], "additionalProperties": False,
        "properties": {"age": {"type": "integer", "minimum": 0}, "unit": {"enum": ["y", "m"]}},
    })
    answer = '{"age": 3, "unit": "y"}'
    broken = ('{"unit": "y"}', '{"age": -1, "unit": "y"}', '{"age": 3, "unit": "y", "z": 1}', "3")
    assert score(metric, answer, answer, '{"age": 3}', *broken) == [1, 0.5, 0, 0, 0, 0]
    assert "is a required property" in check(metric, '{"unit": "y"}')
    assert "no JSON" in check(metric, "three")


def test_a_schemas_pattern_has_a_time_limit(with_schema, monkeypatch):
    monkeypatch.setattr("pi_ray.metrics.json_fields.PATTERN_SECONDS", 0.05)
    metric, began = with_schema({"type": "string", "pattern": "^(a|aa)+$"}), time.monotonic()
    assert score(metric, '"aaa"', json.dumps("a" * 60 + "!"), '"aaa"') == [0, 1]
    assert time.monotonic() - began < 2


def test_what_a_schema_cannot_compute_scores_nothing(with_schema):
    metric = with_schema({"properties": {"n": {"multipleOf": 0.5}}})
    assert score(metric, '{"n": 1.5}', f'{{"n": {"9" * 400}}}', '{"n": 1e999}', '{"n": 1.5}') == [0, 0, 1]


@pytest.mark.parametrize("schema, says", [
    ({"pattern": "(a"}, "'\\(a' is not a 'regex'"), ("{", "not a JSON Schema"),
    ({"type": "nothing"}, "not a JSON Schema"),
    ({"patternProperties": {"a": {}}}, "name the properties"),
])  # fmt: skip
def test_what_is_no_schema_is_refused(with_schema, schema, says):
    with pytest.raises(ConfigError, match=says):
        score(with_schema(schema), '"text"')


def test_a_schema_fetches_nothing(with_schema):
    with pytest.raises(ConfigError, match="nothing is fetched"):
        check(with_schema({"$ref": "https://example.com/schema.json"}), "{}")


def test_a_missing_schema_and_empty_fields_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        score({"name": "json", "file": str(tmp_path / "none.json")}, "{}")
    with pytest.raises(ConfigError, match="names with dots"):
        score({"name": "json", "fields": ["a..b"]}, "{}")


def test_an_answer_that_is_no_json_is_refused():
    with pytest.raises(DataError, match=r"row '7'.*no JSON"):
        RowScorer(TaskConfig(metric="json")).score(Row("7", "q", "none"), "{}")
