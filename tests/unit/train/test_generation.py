"""Greedy generation with a shared prefix equals transformers' own, row by row, in any batch."""

import pytest

from pi_ray.config import ModelConfig
from pi_ray.errors import ModelError
from pi_ray.models import load_model
from pi_ray.train.batches import plain_batch
from pi_ray.train.generation import compute_prefix_cache, generate_greedy, request_seconds
from tests.bench.families import tiny_model as tiny_random_model
from tests.generated import generate_alone

PREFIX = list(range(100, 130))
ROWS = [[5, 6, 7], [200, 201, 202, 203, 204], [9]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(ModelConfig(base=str(tiny_model)))


@pytest.fixture(scope="module")
def expected(model):
    return generate_alone(model, PREFIX, ROWS, 8)


def test_each_row_of_a_batch_gets_what_transformers_generates_for_it_alone(model, expected):
    assert generate_greedy(model, PREFIX, ROWS, 8, end=None) == expected


def test_a_cached_prefix_changes_nothing_and_is_not_used_up(model, expected):
    cache = compute_prefix_cache(model, PREFIX)
    for _ in range(2):
        assert generate_greedy(model, PREFIX, ROWS, 8, end=None, cache=cache) == expected
    assert cache.get_seq_length() == len(PREFIX)


def test_a_row_stops_at_its_end_token_and_the_others_go_on(model, expected):
    end = expected[0][2]
    assert generate_greedy(model, PREFIX, ROWS, 8, end=end) == [
        ids[: ids.index(end)] if end in ids else ids for ids in expected
    ]


def test_no_prefix_is_a_prefix_too(model, expected):
    assert generate_greedy(model, [], [PREFIX + ROWS[0]], 8, end=None) == expected[:1]


def test_latency_gives_seconds_with_and_without_the_cache(model):
    assert request_seconds(model, PREFIX, ROWS[0], 3) > 0
    cache, filled = compute_prefix_cache(model, PREFIX), []
    assert request_seconds(model, PREFIX, ROWS[0], 3, cache, fill=lambda: filled.append(cache) or cache) > 0
    assert not filled, "a known cache is not computed again"
    assert request_seconds(model, PREFIX, ROWS[0], 3, fill=lambda: filled.append(cache) or cache) > 0
    assert len(filled) == 1 and cache.get_seq_length() == len(PREFIX)


def test_the_output_layer_gets_rows_that_lie_together(model):
    """Otherwise torch multiplies each row with a copy of the output layer's weights."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        generate_greedy(model, PREFIX, ROWS, 2, end=None)
        model(**plain_batch(PREFIX, [(row, [1, 2]) for row in ROWS]).inputs)
    finally:
        hook.remove()
    assert [tuple(x.shape[:2]) for x in seen] == [(1, 1), (3, 1), (3, 1), (3, 2)]
    assert all(x.is_contiguous() for x in seen)


def test_an_answer_that_has_begun_ends_at_a_line_break(model, expected):
    answer = expected[0]
    stop = next(i for i, token in enumerate(answer) if token != answer[0] and i)
    made = generate_greedy(model, PREFIX, ROWS, 8, end=None, breaks={answer[stop]})
    assert made[0] == answer[: answer.index(answer[stop]) + 1]
    others = [row[: row.index(answer[stop]) + 1] if answer[stop] in row[1:] else row for row in expected[1:]]
    assert made[1:] == others
    # breaks before anything else do not end it
    assert generate_greedy(model, PREFIX, ROWS[:1], 8, end=None, breaks=set(answer)) == [answer]


def test_a_model_that_does_not_go_on_from_a_cache_is_refused():
    rwkv = tiny_random_model("rwkv", {"attention_hidden_size": 32})
    with pytest.raises(ModelError, match="RwkvForCausalLM cannot generate: with its cache it computes something else"):
        generate_greedy(rwkv, PREFIX, ROWS, 3, end=None)
