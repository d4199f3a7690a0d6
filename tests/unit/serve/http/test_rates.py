"""Requests and tokens a minute of each key, by a clock that stands still."""

import asyncio

import pytest

from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.http import rates as rates_module
from pi_ray.serve.http.keys import ApiKey
from pi_ray.serve.http.rates import KeyRates
from pi_ray.serve.http.token_usage import TokenUsage
from tests.unit.fake_bucket import Clock


@pytest.fixture
def clock():
    return Clock()


def refused_for(rates, key):
    """The seconds after which a refused request may come again; 0 where it is admitted."""
    try:
        rates.admit(key)
    except RefusedError as error:
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        return error.retry_after
    return 0


def test_requests_of_a_minute_may_come_at_once_and_then_as_the_limit_refills(clock):
    rates, key = KeyRates(clock=clock), ApiKey(name="a", digest="a", rpm_limit=6)
    assert [refused_for(rates, key) for _ in range(7)] == [0] * 6 + [10]
    clock.now += 9
    assert refused_for(rates, key) == 1
    clock.now += 1
    assert [refused_for(rates, key) for _ in range(2)] == [0, 10]
    clock.now += 600
    assert [refused_for(rates, key) for _ in range(7)] == [0] * 6 + [10], "no more than a minute's worth is kept"


def test_tokens_beyond_the_limit_are_paid_back_before_the_next_request(clock):
    rates, key = KeyRates(clock=clock), ApiKey(name="a", digest="a", tpm_limit=60)
    assert refused_for(rates, key) == 0
    rates.charge(key, 100)
    assert refused_for(rates, key) == 41
    clock.now += 41
    assert refused_for(rates, key) == 0


def test_tokens_of_a_month_are_a_budget_that_a_restart_keeps(clock, tmp_path):
    key = ApiKey(name="a", digest="a", monthly_tokens=10)
    rates = KeyRates(usage_dir=str(tmp_path), clock=clock)
    for tokens in (9, 5):
        rates.admit(key)
        rates.charge(key, tokens)
    rates._usage.sync()
    for each in (rates, KeyRates(usage_dir=str(tmp_path), clock=clock)):
        with pytest.raises(RefusedError, match="has used its 10 tokens of this month") as error:
            each.admit(key)
        assert (error.value.status, error.value.code) == (429, "insufficient_quota")
    with pytest.raises(RefusedError, match="cannot count") as error:  # the keys file has changed since the start
        KeyRates(clock=clock).admit(key)
    assert error.value.status == 503


def test_a_body_counts_as_the_answers_that_it_asks_for_and_one_beyond_the_limit_waits_for_a_full_bucket(clock):
    rates, key = KeyRates(clock=clock), ApiKey(name="a", digest="a", rpm_limit=6)
    rates.admit(key, 4)
    assert [refused_for(rates, key) for _ in range(3)] == [0, 0, 10]
    clock.now += 59
    with pytest.raises(RefusedError):
        rates.admit(key, 9)
    clock.now += 1
    rates.admit(key, 9)
    assert refused_for(rates, key) == 40


def test_a_share_of_less_than_one_request_a_minute_lets_one_through_in_more_time(clock):
    rates, key = KeyRates(shares=4, clock=clock), ApiKey(name="a", digest="a", rpm_limit=2)
    assert [refused_for(rates, key) for _ in range(2)] == [0, 120]
    clock.now += 120
    assert [refused_for(rates, key) for _ in range(2)] == [0, 120]


def test_tokens_of_a_month_are_kept_without_further_requests_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rates_module, "SYNC_S", 0.01)
    key = ApiKey(name="a", digest="a", monthly_tokens=10)

    def kept():
        return TokenUsage(tmp_path).used("a")

    async def serve():
        rates = KeyRates(usage_dir=str(tmp_path))
        async with rates.keep_usage():
            rates.charge(key, 5)
            while kept() != 5:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(rates_module, "SYNC_S", 60)
            await asyncio.sleep(0.1)
            rates.charge(key, 2)

    asyncio.run(asyncio.wait_for(serve(), 30))
    assert kept() == 7


def test_keys_are_counted_apart_and_one_without_limits_is_never_refused(clock):
    rates = KeyRates(clock=clock)
    one, two, free = (ApiKey(name="same", digest=d, rpm_limit=limit) for d, limit in (("1", 1), ("2", 1), ("3", None)))
    assert [refused_for(rates, key) for key in (one, two, one, two)] == [0, 0, 60, 60]
    rates.charge(free, 10**9)
    assert [refused_for(rates, free) for _ in range(100)] == [0] * 100


def test_a_refused_request_takes_nothing_and_replicas_share_a_limit(clock):
    both = ApiKey(name="a", digest="a", rpm_limit=8, tpm_limit=60)
    rates = KeyRates(shares=2, clock=clock)
    rates.charge(both, 31)
    assert [refused_for(rates, both) for _ in range(9)] == [4] * 9
    clock.now += 4
    assert [refused_for(rates, both) for _ in range(5)] == [0] * 4 + [15]
