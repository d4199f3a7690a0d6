"""The sides of the benchmark of generation give the same answers, or it would compare different work."""

import random

import pytest

from pi_ray.config import ModelConfig
from pi_ray.models import load_model
from tests.bench.generation import agreement, conversations, ours, transformers_alone, transformers_with_cache

PREFIX = list(range(100, 130))
ROWS = [[5, 9, 11], [7], [6, 8, 12, 13, 4]]


@pytest.mark.parametrize("rows", [ROWS, conversations(random.Random(0), 2, 3, 200)])
@pytest.mark.parametrize("peer", [transformers_alone, transformers_with_cache])
def test_every_side_gives_the_same_tokens(tiny_model, peer, rows):
    model = load_model(ModelConfig(base=str(tiny_model), dtype="float32")).eval()
    mine, theirs = ours(model, PREFIX, rows, 6, 4), peer(model, PREFIX, rows, 6, 2)
    assert mine == theirs and [len(answer) for answer in mine] == [6] * len(rows)


def test_turns_of_a_conversation_begin_alike():
    first, second, third, other, *_ = conversations(random.Random(0), 2, 3, 200)
    assert second[: len(first)] == first and third[: len(second)] == second and other[0] != first[0]


def test_agreement_counts_tokens_before_a_rows_first_difference():
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == pytest.approx(4 / 6)
    assert agreement([[1, 2]], [[3, 2]]) == 0
