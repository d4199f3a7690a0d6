"""The answer stands in the output as words of its own."""

from tests.unit.metrics.scores import EMOJI, score


def test_the_answer_stands_in_the_output_as_words_of_its_own():
    assert score("contains", "Paris", "It is PARIS, of course.", "Parisian", "comparis", "Rome", "") == [1, 0, 0, 0, 0]
    assert score("contains", "New York", "in new york city", "New, York", "York New") == [1, 1, 0]
    assert score("contains", "5", "15", "5 apples", "It is 5.", "3-5") == [0, 1, 1, 1]


def test_another_number_and_a_part_of_a_word_in_any_script_do_not_hold_the_answer():
    assert score("contains", "5", "0.5", "5.9", "-5", "-3, 5") == [0, 0, 0, 1]
    assert score("contains", "-5", "it is -5", "5") == [1, 0]
    cat = "\u043a\u043e\u0442"  # in Russian, of which "which" begins with it
    assert score("contains", cat, f"{cat}!", f"{cat}\u043e\u0440\u044b\u0439") == [1, 0]
    assert score("contains", "caf", "caf\u00e9", "a caf!") == [0, 1]


def test_scripts_without_spaces_and_answers_of_punctuation_alone():
    assert score("contains", "\u5317\u4eac", "\u7b54\u6848\u662f\u5317\u4eac\u3002", "\u5317") == [1, 0]
    assert score("contains", EMOJI, f"fine {EMOJI}", "fine") == [1, 0]
    assert score("contains", "?!", "what ?!", "what") == [1, 0]


def test_an_answer_that_is_a_pattern_is_no_pattern():
    assert score("contains", "(a+)+b", "x (a+)+b", "aab") == [1, 0], "punctuation is left out of both"
