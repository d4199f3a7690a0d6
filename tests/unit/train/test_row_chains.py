"""Rows that begin alike are read once, and get the tokens that transformers generates for each of them alone."""

import pytest
import torch

from pi_ray.train import generation
from pi_ray.train.generation import compute_prefix_cache, generate, generate_greedy
from pi_ray.train.row_chains import OWN_TOKENS, SHARED_TOKENS, chain_batches, chains_pay, find_chains
from tests.generated import generate_alone
from tests.unit.train.test_cached_prefix import PREFIX, random_model

HEADER = [3, 4]  # of an answer, which a request ends with and a conversation goes on after


def conversation(first, lengths):
    """The prompts of a conversation's turns, of so many tokens, whose first token is `first`."""
    torch.manual_seed(first)
    past = [first, *torch.randint(5, 128, (max(lengths),)).tolist()]
    return [past[: n - len(HEADER)] + HEADER for n in lengths]


TURNS = conversation(9, [300, 160, 420, 230])
OTHERS = conversation(8, [200, 330])
LONE, SHORT = conversation(7, [150])[0], [5, 6, 7]
ROWS = [TURNS[0], OTHERS[0], LONE, TURNS[1], TURNS[2], SHORT, OTHERS[1], TURNS[3]]


@pytest.fixture
def read(monkeypatch):
    """The sizes (rows, tokens) of what the model reads in chains, or as whole rows."""
    found, forward = [], generation._RowCache.forward

    def noted(self, ids, mask, keep):
        if ids.shape[1] > 1:
            found.append(tuple(ids.shape))
        return forward(self, ids, mask, keep)

    monkeypatch.setattr(generation._RowCache, "forward", noted)
    return found


def test_turns_of_a_conversation_are_a_chain():
    assert find_chains(ROWS) == [[4, 0, 7, 3], [6, 1], [2], [5]]
    assert find_chains([SHORT, LONE, SHORT]) == [[1], [0], [2]]
    assert find_chains([]) == []


def test_a_row_of_a_chain_has_few_tokens_of_its_own():
    whole = list(range(200))
    near, far = whole[:100] + [1] * OWN_TOKENS, whole[:100] + [0] * (OWN_TOKENS + 1)
    short = [*whole[: SHARED_TOKENS - 1], 0]
    assert find_chains([near, whole, far, short]) == [[1, 0], [2], [3]]


def test_chains_stay_together_in_batches_where_they_fit():
    assert chain_batches(ROWS, 4) == [[4, 0, 7, 3], [6, 1, 2, 5]]
    assert chain_batches(ROWS, 3) == [[4, 0, 7], [3, 6, 1], [2, 5]]
    assert chain_batches(ROWS, 5) == [[4, 0, 7, 3], [6, 1, 2, 5]]
    assert chain_batches(ROWS, 99) == [[4, 0, 7, 3, 6, 1, 2, 5]] and chain_batches([], 4) == []


def test_short_rows_keep_their_own_batch():
    rows = [[9, *range(n)] for n in range(5, 30)]
    assert not chains_pay(rows, find_chains(rows))
    assert [len(rows[i]) for batch in chain_batches(rows, 8) for i in batch] == sorted(map(len, rows), reverse=True)


@pytest.mark.parametrize("prefix", [PREFIX, []])
@pytest.mark.parametrize("family, settings", [
    ("Llama", {}), ("Mixtral", {"num_local_experts": 4, "sliding_window": None}), ("Qwen3", {"head_dim": 8}),
])  # fmt: skip
def test_each_conversation_is_read_once_and_every_turn_gets_its_own_answer(family, settings, prefix, read):
    model = random_model(family, max_position_embeddings=1024, **settings)
    cache = compute_prefix_cache(model, prefix)
    assert generate_greedy(model, prefix, ROWS, 6, None, cache) == generate_alone(model, prefix, ROWS, 6)
    assert read == [(1, 420), (1, 330), (1, 150), (1, 3), (8, 2)]
    assert cache.get_seq_length() == len(prefix) and model.config._attn_implementation == "sdpa"


def test_rows_that_end_leave_the_others_what_they_see():
    model = random_model("Llama", max_position_embeddings=1024)
    expected = generate_alone(model, PREFIX, ROWS, 8)
    for end in {token for answer in expected for token in answer[1:5]}:
        assert generate_greedy(model, PREFIX, ROWS, 8, end) == [
            answer[: answer.index(end)] if end in answer else answer for answer in expected
        ]


def test_a_choice_is_told_the_rows_as_they_were_given():
    model, told = random_model("Llama", max_position_embeddings=1024), []

    def choose(logits, rows):
        told.append(list(rows))
        return [row for row in rows]

    assert generate(model, PREFIX, ROWS, 2, None, choose=choose) == [[row, row] for row in range(len(ROWS))]
    assert told == [[*range(len(ROWS))]] * 2


def test_layers_with_a_window_read_each_row_as_before(read):
    model = random_model("Mistral", sliding_window=100, max_position_embeddings=1024)
    assert generate_greedy(model, PREFIX, TURNS, 4, None) == generate_alone(model, PREFIX, TURNS, 4)
    assert sorted(read) == sorted((1, len(turn)) for turn in TURNS)


def test_a_model_that_cannot_share_a_cache_reads_padded_rows(read, monkeypatch):
    model = random_model("Llama", max_position_embeddings=1024)
    monkeypatch.setattr(generation, "attends_to_cached_prefix", lambda model, cache: False)
    assert generate_greedy(model, [], TURNS, 4, None) == generate_alone(model, [], TURNS, 4)
    assert read == [(4, 420)]


def test_few_tokens_saved_are_not_worth_a_chain(read):
    rows = conversation(6, [90, 120])
    model = random_model("Llama", max_position_embeddings=1024)
    assert generate_greedy(model, [], rows, 4, None) == generate_alone(model, [], rows, 4)
    assert read == [(2, 120)]
