"""The last number counts, however it is written, within the tolerance."""

import pytest

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.metrics import RowScorer
from pi_ray.metrics.number import last_number
from pi_ray.protocols import Row
from tests.unit.metrics.scores import check, score


def test_the_last_number_counts():
    assert score("number", "#### 42", "first 41, then 42.", "42 of 43", "forty-two", "") == [1, 0, 0, 0]


@pytest.mark.parametrize("text, number", [
    ("1,234.50", "1234.5"), ("$1,000", "1000"), ("-$5", "-5"), ("3-4", "4"), ("x = -4", "-4"), ("(\u22124)", "-4"),
    (".5", "0.5"), ("1e3", "1000"), ("12,34", "34"), ("50%", "50"), ("1.2.3", "3"), ("+7", "7"), ("\u0663", "3"),
    ("-0", "0"),
])  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, number):
    assert last_number(text) == last_number(number)


def test_tolerances_are_absolute_or_a_share_and_the_larger_one_holds():
    assert score({"name": "number", "tolerance": 0.5}, "10", "10.5", "9.5", "10.51") == [1, 1, 0]
    assert score({"name": "number", "relative_tolerance": 0.01}, "-200", "-202", "-198", "-203", "200") == [1, 1, 0, 0]
    assert score({"name": "number", "tolerance": 3, "relative_tolerance": 0.01}, "100", "103", "104") == [1, 0]
    assert score("number", "0.1", "0.1000", "0.10001") == [1, 0]


def test_huge_numbers_cost_no_time_and_differ_in_their_last_digit():
    digits = "9" * 5_000
    assert score("number", digits, digits, digits[:-1] + "8", "1" + digits) == [1, 0, 0]
    assert score("number", "1e999999999", "1e999999999", "1e999999998", "0") == [1, 0, 0]
    assert score({"name": "number", "relative_tolerance": 0.5}, "1e999999999", "0.9e999999999", "5") == [1, 0]
    assert last_number("7 and 1e99999999999999999999999999") == 7, "an exponent beyond all numbers is none"


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-Infinity", "1e", "."])
def test_what_is_no_number_never_counts(text):
    assert score("number", "1", text) == [float(text == "1e")]


def test_an_answer_without_a_number_is_refused():
    assert "has no number" in check("number", "forty-two")
    with pytest.raises(DataError, match=r"row 'r7'.*no number"):
        RowScorer(TaskConfig(metric="number")).score(Row("r7", "q", "none"), "5")
