"""Near duplicates are found as if all pairs were compared."""

from itertools import combinations
from random import Random

import pytest

from pi_ray.ask.near import NearDuplicates, word_sequences

TEXT = "alert me when the memory of checkout stays above two gigabytes for an hour"
WORDS = TEXT.split()


def similarity(one, other):
    a, b = word_sequences(one), word_sequences(other)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("least", [0.5, 0.85, 1.0])
def test_prefix_filtering_finds_what_comparing_all_pairs_finds(least):
    random = Random(0)
    texts = []
    for _ in range(60):
        words = WORDS[: random.randint(3, len(WORDS))]
        for _ in range(random.randint(0, 2)):
            words[random.randrange(len(words))] = random.choice(WORDS)
        texts.append(" ".join(words))
    for text, other in combinations(texts, 2):
        near = NearDuplicates(least)
        near.add(other)
        assert near.finds(text) == (similarity(text, other) >= least)
    assert any(least <= similarity(a, b) < 1 or least == 1 for a, b in combinations(texts, 2))


def test_texts_without_spaces_are_compared_character_by_character():
    near = NearDuplicates(0.7)
    near.add("请问我的订单现在到哪里了")
    assert near.finds("请问我的订单现在到哪里了呢？") and not near.finds("我想知道今天的天气怎么样")


def test_case_and_punctuation_make_no_difference_but_the_key_does():
    near = NearDuplicates(1.0)
    near.add("Is it late?", "a")
    assert near.finds("is it LATE", "a")
    assert not near.finds("is it late", "b")
    assert not near.finds("is it early", "a")
