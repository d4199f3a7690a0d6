"""F1 counts shared words as often as both texts have them."""

import pytest

from tests.unit.metrics.scores import score


def test_words_are_shared_as_often_as_both_have_them():
    assert score("f1", "the red fox", "a fox, red", "red", "red red fox", "red red red") == [1, 0.667, 0.8, 0.4]


@pytest.mark.parametrize("output", ["", "...", "the", "blue whale"])
def test_nothing_in_common_scores_nothing(output):
    assert score("f1", "red fox", output) == [0]


def test_nothing_is_what_an_answer_without_words_wants():
    assert score("f1", "?!", "", "the", "word") == [1, 1, 0]


def test_chinese_characters_count_one_by_one():
    assert score("f1", "\u5317\u4eac\u5e02", "\u5317\u4eac", "\u5e02") == [0.8, 0.5]


def test_a_long_output_takes_no_time():
    assert score("f1", "a b", "b " * 200_000)[0] == 0.0
