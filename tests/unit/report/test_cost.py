"""Tokens to money, the break-even, and a verdict that does not flatter."""

import pytest

from pi_ray import progress
from pi_ray.config import CostConfig
from pi_ray.report import cost
from tests.unit.fake_run import summary

PRICES = CostConfig(input=1.0, cached_input=0.1, output=2.0, training_hour=3.0, requests_per_month=1000)


def test_a_request_is_priced_by_fresh_cached_and_generated_tokens():
    price = cost.request_prices(PRICES, 1000, 50, prefix_tokens=900)
    assert price.uncached == pytest.approx((1000 * 1.0 + 50 * 2.0) / 1e6)
    assert price.cached == pytest.approx((100 * 1.0 + 900 * 0.1 + 50 * 2.0) / 1e6)


def test_more_cached_tokens_than_there_are_is_no_negative_price():
    assert cost.request_prices(PRICES, 10, 0, prefix_tokens=99).cached == pytest.approx(10 * 0.1 / 1e6)


def test_training_is_paid_by_worker_and_hour():
    assert cost.training_cost(PRICES, seconds=1800, workers=4) == 6.0


@pytest.mark.parametrize(("training", "before", "after", "requests"), [
    (1.0, 0.2, 0.1, 10), (1.0, 0.4, 0.1, 4), (0.0, 0.2, 0.1, 0), (1.0, 0.1, 0.1, None), (1.0, 0.1, 0.2, None),
])
def test_break_even_counts_whole_requests_and_may_never_come(training, before, after, requests):
    assert cost.break_even(training, before - after) == requests


def test_a_cached_prompt_is_the_harder_opponent():
    money = cost.summary_economics(summary(), CostConfig())
    assert 0 < money.saving.cached < money.saving.uncached
    assert money.requests_uncached < money.requests_cached


def test_plain_fine_tuning_costs_the_same_per_request():
    prices = cost.summary_economics(summary(), CostConfig()).prices
    assert prices["plain"] == prices["promptintern"]


def test_verdict_pays_when_quality_holds_and_training_comes_back_soon():
    text = cost.verdict(summary(), CostConfig())
    assert text.startswith("The adapter pays") and "cached prefix" in text and "Plain" not in text


def test_verdict_keeps_the_prompt_when_quality_falls():
    text = cost.verdict(
        summary(**{"base_full_prompt.exact_match": 0.9, "base_full_prompt.intervals.exact_match": [0.85, 0.95]}),
        CostConfig(),
    )
    assert text.startswith("Keep your prompt") and "70% against 90%" in text


def test_verdict_keeps_the_prompt_when_the_cached_prompt_costs_no_more():
    text = cost.verdict(summary(**{"promptintern.output_tokens": 60.0}), CostConfig())
    assert text.startswith("Keep your prompt and cache its prefix") and "Without such a cache" in text


def test_verdict_keeps_the_prompt_when_payback_takes_more_than_a_year():
    text = cost.verdict(summary(), CostConfig(requests_per_month=1000))
    assert text.startswith("Keep your prompt") and "months" in text


def test_verdict_praises_no_adapter_that_answers_almost_nothing():
    weak = {"promptintern.exact_match": 0.02, "promptintern.intervals.exact_match": [0.0, 0.05]}
    text = cost.verdict(
        summary(**weak, **{"base_full_prompt.exact_match": 0.0, "base_full_prompt.intervals.exact_match": [0.0, 0.0]}),
        CostConfig(),
    )
    assert text.startswith("Keep looking") and "2%" in text and "pays" not in text


def test_verdict_says_when_plain_fine_tuning_is_no_worse():
    text = cost.verdict(
        summary(**{"plain.exact_match": 0.71, "plain.intervals.exact_match": [0.65, 0.77]}), CostConfig()
    )
    assert "Plain fine-tuning saves as much, its quality is level" in text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "EUR 0"), (1234.5, "EUR 1,234.50"), (0.25, "EUR 0.250"), (0.0000432, "EUR 0.0000432"), (-37.3, "EUR -37.30")],
)
def test_money_shows_the_digits_that_matter(amount, text):
    assert progress.format_money(amount, "EUR") == text
