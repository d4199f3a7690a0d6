"""How a row picks its next token: greedy, by temperature and top_p, with log-probabilities, whoever else is in the
batch.
"""

import pytest
import torch

from pi_ray.protocols import GenerationRequest
from pi_ray.train import sampling
from pi_ray.train.sampling import Sampler, sample_tokens

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def sampler(**settings):
    return Sampler(GenerationRequest([1], 1, **settings))


def ids(logits, rows):
    return [token.id for token in sample_tokens(logits, rows)]


def test_temperature_zero_takes_the_likeliest():
    assert ids(torch.stack([LOGITS, LOGITS.flip(0)]), [sampler(), sampler(seed=3)]) == [0, 3]


@pytest.mark.parametrize("likely", [2, 1024])
def test_top_p_keeps_the_smallest_set_that_holds_top_p(monkeypatch, likely):
    """Also where the nucleus is larger than what is sorted first."""
    monkeypatch.setattr(sampling, "PARTIAL_SORT", likely)
    found = {
        top_p: set(ids(LOGITS.expand(200, -1), [sampler(temperature=1.0, top_p=top_p, seed=s) for s in range(200)]))
        for top_p in (1e-9, 0.1, 0.6, 0.9, 1.0)
    }
    assert found == {1e-9: {0}, 0.1: {0}, 0.6: {0, 1}, 0.9: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_tokens_come_as_often_as_their_probability_says():
    drawn = ids(LOGITS.expand(4000, -1), [sampler(temperature=1.0, seed=s) for s in range(4000)])
    assert [drawn.count(i) / 4000 for i in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    cold = ids(LOGITS.expand(1000, -1), [sampler(temperature=0.25, seed=s) for s in range(1000)])
    assert cold.count(0) / 1000 == pytest.approx(0.5**4 / sum(p**4 for p in (0.5, 0.3, 0.15, 0.05)), abs=0.04)


def test_a_temperature_near_zero_is_greedy_and_not_a_nan():
    assert ids(LOGITS[None], [sampler(temperature=1e-30, seed=1)]) == [0]


def test_a_seed_draws_the_same_tokens_alone_and_in_a_batch():
    torch.manual_seed(0)
    logits = torch.randn(5, 50)
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 7}

    def drawn(company):
        row = sampler(**settings)
        return [
            ids(
                torch.cat([logits[i : i + 1], *([torch.randn(2, 50)] if company else [])]),
                [row, *([sampler(temperature=1.0), sampler()] if company else [])],
            )[0]
            for i in range(5)
        ]

    assert drawn(company=False) == drawn(company=True)


def test_neighbouring_seeds_draw_different_tokens_below_zero_too():
    """n answers have n seeds in a row, and Python's own generator takes -1 for 1."""
    drawn = {
        seed: [row.random.random() for row in [sampler(temperature=1.0, seed=seed)]]
        for seed in (-2, -1, 0, 1, 2, -(2**63), 2**63 - 1)
    }
    assert len({tuple(numbers) for numbers in drawn.values()}) == len(drawn)


def test_the_highest_random_number_does_not_reach_a_token_of_no_probability():
    row = sampler(temperature=1.0)
    row.random.random = lambda: 1 - 2**-53
    assert ids(torch.tensor([[0.0, 0.0, -torch.inf]]), [row]) == [1]


def test_logprobs_are_the_models_own_whatever_the_temperature():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    plain, none, hot = sample_tokens(
        logits, [sampler(logprobs=3), sampler(), sampler(logprobs=0, temperature=5.0, seed=1)]
    )
    expected = torch.log_softmax(logits, -1)
    assert (
        plain.logprob == pytest.approx(expected[0].max().item())
        and [i for i, _ in plain.top] == expected[0].topk(3).indices.tolist()
    )
    assert [p for _, p in plain.top] == pytest.approx(expected[0].topk(3).values.tolist())
    assert (none.logprob, none.top) == (None, ())
    assert hot.logprob == pytest.approx(expected[2, hot.id].item()) and hot.top == ()


def test_a_row_with_nan_logits_gets_no_token_and_the_others_do():
    logits = torch.stack([LOGITS, LOGITS * torch.nan, LOGITS.flip(0)])
    rows = [sampler(logprobs=1), sampler(logprobs=1, temperature=1.0), sampler()]
    found = sample_tokens(logits, rows)
    assert found[1] is None and [found[0].id, found[2].id] == [0, 3]
