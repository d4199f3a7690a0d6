"""What a pattern finds is compared, within a time that no pattern can exceed."""

import time

import pytest

from pi_ray.errors import ConfigError
from pi_ray.metrics import regex as module
from tests.unit.metrics.scores import score

ENDLESS, TEXT = r"^(a|aa)+$", "a" * 60 + "!"  # exponential time, also in the package regex


def by(pattern):
    return {"name": "regex", "pattern": pattern}


def test_the_first_group_of_output_and_answer_is_compared():
    outputs = ("so: answer: 7", "answer: 8", "7", "", "answer: 7, answer: 8")
    assert score(by(r"answer: (\w+)"), "answer: 7", *outputs) == [1, 0, 0, 0, 1]
    assert score(by(r"\d+"), "it is 42", "42 of them", "41", "none") == [1, 0, 0]


def test_an_answer_without_a_match_is_what_must_be_found():
    assert score(by(r"answer: (\w+)"), "Paris", "the answer: Paris", "Paris", "answer: paris") == [1, 0, 0]


def test_a_group_that_took_no_part_finds_nothing():
    assert score(by(r"x(y)?"), "xy", "x", "xy") == [0, 1]


def test_an_endless_search_ends_scores_nothing_and_is_said(monkeypatch, caplog):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    began = time.monotonic()
    assert score(by(ENDLESS), "aaa", TEXT, "aaa") == [0, 1]
    assert time.monotonic() - began < 2 and "repeats inside repeats" in caplog.text


def test_many_endless_searches_take_less_each(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    monkeypatch.setattr(module, "PATIENCE", 1)
    began = time.monotonic()
    assert score(by(ENDLESS), "aaa", *[TEXT] * 6) == [0] * 6
    assert time.monotonic() - began < 2


def test_what_is_no_pattern_is_refused():
    with pytest.raises(ConfigError, match="no regular expression: missing \\)"):
        score(by("(a"), "a")
