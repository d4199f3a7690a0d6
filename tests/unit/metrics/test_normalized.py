"""Case, punctuation, articles and white space do not count; numbers, signs and letters of all scripts do."""

from tests.unit.metrics.scores import COMBINING, EMOJI, HINDI, score


def test_case_punctuation_articles_and_white_space_do_not_count():
    assert score("normalized", "The Eiffel Tower.", "eiffel  tower", "EIFFEL-TOWER, the", "Eiffel") == [1, 0, 0]
    assert score("normalized", "it's here", "ITS HERE!", "«it’s» here", "it is here") == [1, 1, 0]


def test_decimal_points_and_minus_signs_count_and_thousands_commas_do_not():
    assert score("normalized", "3.5", "3.5.", "35", "3,5", "-3.5", "3.50") == [1, 0, 0, 0, 0]
    assert score("normalized", "-1,200", "\u22121200", "1200", "- 1200") == [1, 0, 0]


def test_letters_are_compared_by_their_compatibility_form_and_marks_belong_to_them():
    assert score("normalized", COMBINING, "CAF\u00c9", "cafe") == [1, 0]
    assert score("normalized", "\uff21\uff22\uff11", "ab1") == [1]
    assert score("normalized", "Stra\u00dfe", "STRASSE") == [1]
    assert score("normalized", HINDI, HINDI[0], HINDI) == [0, 1], "a vowel sign is no punctuation"


def test_an_empty_output_is_wrong_and_an_answer_of_punctuation_alone_is_compared_as_it_is():
    assert score("normalized", "yes", "", " ", "...") == [0, 0, 0]
    assert score("normalized", "?!", "?!", " ?!\n", "!?", "") == [1, 1, 0, 0]
    assert score("normalized", EMOJI, EMOJI, "") == [1, 0]
    assert score("normalized", "the", "The", "an") == [0, 0], "an article alone is all that there is to compare"
