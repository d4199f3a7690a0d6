"""Patterns: constant text and values that vary are told apart, and texts of another kind are not mixed in."""

import random

import pytest

from pi_ray.request_log.pattern import Likeness, find_patterns

SAME, HEAD = Likeness(0.6, 0), Likeness(0, 40)
DATED = "You sort mail for a bank.\n\nThe current time is {}.\n\nAnswer with a label, nothing else."


def grow(texts, least=SAME):
    (pattern,) = find_patterns(dict.fromkeys(texts, 1), least)
    return pattern


def test_a_date_becomes_a_value_with_the_name_of_the_words_before_it():
    texts = [DATED.format(f"2025-03-{day} 10:0{day % 10}") for day in range(10, 30)]
    pattern = grow(texts)
    assert pattern.parts == tuple(DATED.split("{}"))
    assert pattern.values(texts[3]) == ("2025-03-13 10:03",) and pattern.value_names() == ["current_time"]


def test_values_and_constant_parts_are_the_whole_text_in_order():
    letter = "Dear {0}, today is {1}. Please read this letter from all of us at the bank to the end.\n{0}"
    values = [("Anna Maria", "Monday"), ("Bo", "the 3rd of May"), ("Chloe Li", "Friday"), ("Anna Maria", "Friday")]
    texts = [letter.format(*some) for some in values]
    pattern = grow(texts)
    for text in texts:
        values = pattern.values(text)
        parts = [part for pair in zip(pattern.parts, (*values, ""), strict=True) for part in pair]
        assert "".join(parts) == text


def test_a_pattern_fits_every_text_that_it_was_made_of():
    texts = [f"a b c d e f g {i} h i j {'k l ' * (i % 3)}m n o p q r s {i * i} t" for i in range(40)]
    patterns = find_patterns(dict.fromkeys(texts, 1), SAME)
    assert len(patterns) == 1 and all(patterns[0].values(text) is not None for text in texts)


@pytest.mark.parametrize("text", [
    "", "You sort mail", DATED.format("now") + " And say why.", "Hello. " + DATED.format("now"),
    DATED.format("now").replace("Answer with a label", "Answer with two labels"),
])  # fmt: skip
def test_a_text_without_all_constant_parts_does_not_fit(text):
    assert grow([DATED.format("now"), DATED.format("later"), DATED.format("then")]).values(text) is None


def test_prompts_of_two_applications_stay_apart_and_the_commoner_comes_first():
    other = "You translate what the user writes into {}, word by word, and add nothing of your own."
    counts = {DATED.format(day): 1 for day in range(5)} | {other.format(name): 3 for name in ("French", "Dutch")}
    patterns = find_patterns(counts, SAME)
    assert [p.parts[0][:13] for p in patterns] == ["You translate", "You sort mail"]


def test_patterns_of_random_texts_fit_them_and_hold_what_was_constant():
    for seed in range(60):
        chosen = random.Random(seed)
        words = [*(f"w{i}" for i in range(12)), "-", "--", "(w", "w)"]
        constant = [" ".join(chosen.choices(words, k=chosen.randint(4, 9))) for _ in range(chosen.randint(2, 4))]
        texts = []
        for _ in range(12):
            values = [" ".join(chosen.choices([*"abcdef", "-", "(x)"], k=chosen.randint(0, 3))) for _ in constant]
            texts.append(" ".join(f"{part} {value}".strip() for part, value in zip(constant, values, strict=True)))
        pattern = grow(texts)
        assert all(pattern.values(text) is not None for text in texts), seed
        assert pattern.constant >= sum(map(len, constant)) * 0.8, seed


def test_long_values_need_the_looser_likeness():
    texts = [f"Answer the question with what stands below, in one sentence.\n{' '.join(f'w{i * j}' for j in range(60))}"
             for i in range(1, 9)]
    assert {len(pattern.parts) for pattern in find_patterns(dict.fromkeys(texts, 1), SAME)} == {1}
    assert grow(texts, HEAD).parts[0].startswith("Answer the question with what stands below, in one sentence.")


def test_labels_are_constant_and_name_their_values_and_single_words_between_values_are_not():
    letter = "Write to the person whose data stands at the end. Name: {} Age: {} and {}"
    texts = [letter.format(*some) for some in [("Ann", 3, "x"), ("Bob", 4, "y"), ("Cid", 5, "z")]]
    assert grow(texts).values(texts[0]) == ("Ann", "3 and x") and grow(texts).value_names() == ["name", "age"]


def test_white_space_that_differs_is_a_value():
    pattern = grow(["one two three four\nfive six seven eight", "one two three four  five six seven eight"])
    assert pattern.values("one two three four\nfive six seven eight") == ("\n",)
