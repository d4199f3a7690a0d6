"""An output chooses what it is or names, unless it names two."""

import pytest

from pi_ray.errors import ConfigError
from tests.unit.metrics.scores import check, score

LETTERS = {"name": "choice", "choices": ["A", "B", "C"]}
LABELS = {"name": "choice", "choices": ["card", "card lost", "card_fee", "Refund"]}


def test_letters_are_chosen_alone_or_in_a_sentence():
    assert score(LETTERS, "B", "B", "b", "(B)", "B.", "The answer is B") == [1, 1, 1, 1, 1]
    assert score(LETTERS, "A", "A", "A.", "I take a chance", "") == [1, 1, 0, 0]


def test_the_letter_that_is_an_article_too_is_a_choice_in_every_case():
    assert score(LETTERS, "A", "A", "a", "a)", "(A)", "a.", "b") == [1, 1, 1, 1, 1, 0]
    assert score(LETTERS, "B", "b", "(b)", "a") == [1, 1, 0]


def test_an_output_that_names_two_choices_has_chosen_none():
    assert score(LETTERS, "B", "A or B", "B, no, C", "B and B") == [0, 0, 1]


def test_a_longer_choice_goes_before_a_part_of_it():
    assert score(LABELS, "card lost", "Card lost!", "it is card lost", "card", "lost card") == [1, 1, 0, 0]
    assert score(LABELS, "card", "card", "the card", "card lost", "card_fee", "cards") == [1, 1, 0, 0, 0]
    assert score(LABELS, "Refund", "REFUND please", "refunds") == [1, 0]


def test_an_answer_that_is_no_choice_is_refused():
    assert check(LABELS, "loan") == (
        "its answer is none of the choices of task.metric choice (card, card lost, card_fee, Refund)"
    )


@pytest.mark.parametrize("choices", [["A"], ["yes", "Yes!"], ["yes", " "]])
def test_choices_that_cannot_be_told_apart_are_refused(choices):
    with pytest.raises(ConfigError, match="two or more texts"):
        score({"name": "choice", "choices": choices}, choices[0])
