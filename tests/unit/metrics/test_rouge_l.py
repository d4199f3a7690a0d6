"""ROUGE-L is the F1 of the longest common subsequence."""

import random
import time

from pi_ray.metrics.rouge_l import subsequence_length
from tests.unit.metrics.scores import HINDI, score


def test_words_count_in_their_order():
    assert score("rouge_l", "the cat sat on the mat", "The cat, the mat!", "mat the on sat cat the", "dog") == [
        0.8, 0.5, 0,
    ]


def test_characters_of_scripts_without_spaces_are_words():
    assert score("rouge_l", "\u5317\u4eac\u5e02", "\u5317\u4eac\u5e02", "\u5317\u4eac", "\u4e0a\u6d77") == [1, 0.8, 0]


def test_empty_outputs_score_nothing_and_answers_without_words_are_compared_as_they_are():
    assert score("rouge_l", "a b", "", "...") == [0, 0]
    assert score("rouge_l", "?!", "?!", "!", "") == [1, 0, 0]
    assert score("rouge_l", HINDI, HINDI, HINDI[0]) == [1, 0]


def plain_length(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(row[j], before[j + 1])
    return row[-1]


def test_the_bits_find_what_the_table_finds():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(80))] for _ in range(2))
        assert subsequence_length(a, b) == plain_length(a, b)


def test_ten_thousand_words_take_less_than_a_few_seconds():
    began = time.monotonic()
    assert score("rouge_l", "a b c " * 3_000, "c b a " * 3_000)[0] > 0.3
    assert time.monotonic() - began < 5
