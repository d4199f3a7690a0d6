"""What a pattern finds is compared, within a time that no pattern can exceed."""

import pytest

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.errors import ConfigError
from pi_ray.metrics import regex as module
from pi_ray.protocols import Row
from tests.unit.metrics.scores import check, score

ENDLESS, TEXT = r"^(a|aa)+$", "a" * 60 + "!"  # exponential time, also in the package regex


def by(pattern):
    return {"name": "regex", "pattern": pattern}


def test_the_first_group_of_output_and_answer_is_compared():
    outputs = ("so: answer: 7", "answer: 8", "7", "", "answer: 7, answer: 8")
    assert score(by(r"answer: (\w+)"), "answer: 7", *outputs) == [1, 0, 0, 0, 1]
    assert score(by(r"\d+"), "it is 42", "42 of them", "41", "none") == [1, 0, 0]


def test_an_answer_without_a_match_is_what_must_be_found():
    assert score(by(r"answer: (\w+)"), "Paris", "the answer: Paris", "Paris", "answer: paris") == [1, 0, 0]


def test_an_answer_in_which_the_pattern_finds_an_empty_text_is_refused():
    assert "finds an empty text in its answer" in check(by(r"\d*"), "code 42"), "as it would in 'nothing'"
    assert not check(by(r"\d*"), "42 codes") and not check(by(r"x(y)?"), "x")


def test_a_group_that_took_no_part_finds_nothing():
    assert score(by(r"x(y)?"), "xy", "x", "xy") == [0, 1]


def test_an_endless_search_ends_scores_nothing_and_is_said(monkeypatch, caplog):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    assert score(by(ENDLESS), "aaa", TEXT, "aaa") == [0, 1]
    assert "repeats inside repeats" in caplog.text


def test_many_endless_searches_take_less_each(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 2)
    metric, limits = module.RegexMatch(MetricConfig(name="regex", pattern=ENDLESS), TaskConfig()), []

    class Endless:
        pattern, groups = ENDLESS, 0

        def search(self, text, timeout):
            limits.append(timeout)
            raise TimeoutError

    metric.pattern = Endless()
    assert [metric.score(Row("row-1", "", "aaa"), TEXT) for _ in range(4)] == [0] * 4
    assert limits == [1, 1, 0.1, 0.1]


def test_what_is_no_pattern_is_refused():
    with pytest.raises(ConfigError, match="no regular expression: missing \\)"):
        score(by("(a"), "a")
