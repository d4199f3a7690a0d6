"""Tokens -> money: the price of a request, of training, and the number of requests after which training is paid back.

The adapter's tokens are priced like the base model's; hosts that charge more for adapters need other prices in
run.yaml. Plain fine-tuning sends the query alone, so there is nothing to break even against.
"""

import math
from typing import Any, NamedTuple

from pi_ray.config import CostConfig
from pi_ray.metrics.names import metric_in_sentence
from pi_ray.progress import format_money
from pi_ray.report import summary as numbers
from pi_ray.report.reference import is_own_teacher

WEAK_BLEU = 1.0  # of 100, below which answers have next to nothing in common with the wanted ones
PATIENCE_MONTHS = 12  # a payback later than this is called not worth it: prompts and base models change sooner


class Price(NamedTuple):
    """Money for one request."""

    uncached: float  # without a prefix cache
    cached: float


class Economics(NamedTuple):
    """Money against the full prompt."""

    training: float
    prices: dict[str, Price]
    saving: Price  # may be negative
    requests_uncached: int | None  # until training is paid back; None for never
    requests_cached: int | None


def request_prices(cost: CostConfig, input_tokens: float, output_tokens: float, prefix_tokens: float) -> Price:
    """Both prices of a request whose first `prefix_tokens` are equal in all requests."""
    uncached = (input_tokens * cost.input + output_tokens * cost.output) / 1e6
    return Price(uncached, uncached - min(prefix_tokens, input_tokens) * (cost.input - cost.cached_input) / 1e6)


def training_cost(cost: CostConfig, seconds: float, workers: int) -> float:
    return seconds * workers * cost.training_hour / 3600


def trained_cost(cost: CostConfig, facts: dict[str, Any]) -> float:
    """Money for a finished training: the service's charge, or the hours of the workers."""
    return facts["money"] if "money" in facts else training_cost(cost, facts["seconds"], facts["workers"])


def break_even(training: float, saving: float) -> int | None:
    """Requests until `training` is paid back by requests that each save so much; None for never."""
    return math.ceil(round(training / saving, 6)) if saving > 0 else None


def economics(training: float, prices: dict[str, Price]) -> Economics:
    """PromptIntern against the full prompt, each priced without a prefix cache, and each with one."""
    mine, full = prices["promptintern"], prices["base_full_prompt"]
    saving = Price(full.uncached - mine.uncached, full.cached - mine.cached)
    return Economics(training, prices, saving, *(break_even(training, saved) for saved in saving))


def summary_economics(summary: dict[str, Any], cost: CostConfig) -> Economics:
    """Economics from the measured tokens and training time of eval/summary.json."""
    prices = {
        name: request_prices(cost, c["input_tokens"], c["output_tokens"], c["prefix_tokens"])
        for name, c in numbers.summary_columns(summary).items()
    }
    return economics(trained_cost(cost, summary["train"]["promptintern"]), prices)


def verdict(summary: dict[str, Any], cost: CostConfig) -> str:
    """One sentence or two on whether to keep the prompt: first by quality, then by money against the cached prompt."""
    mine, full, metric = summary["promptintern"], summary["base_full_prompt"], numbers.main_metric(summary)
    name = metric_in_sentence(metric)
    ours, theirs = (numbers.format_metric(metric, c[metric]) for c in (mine, full))
    weak = mine[metric] < (WEAK_BLEU if metric == "bleu" else numbers.WEAK)
    if is_own_teacher(summary) and not weak:
        without = numbers.format_metric(metric, summary["base"][metric])
        agrees = f"with {name} {ours}, where the base model without any prompt has {without}"
        if numbers.compare_to(summary, "base", metric) != "better":
            cure = "Give it more queries, more epochs, or a base model that reads the prompt better."
            return f"Keep your prompt: the adapter answers as it does {agrees}, which shows no gain. {cure}"
        decide = f"The adapter answers as your prompt does {agrees}: look at samples whether that is enough."
        return f"{decide} {payback_verdict(summary_economics(summary, cost), cost)}"
    if numbers.compare_to(summary, "base_full_prompt", metric) == "worse":
        worse = f"{name} {ours} against {theirs} with the full prompt"
        return f"Keep your prompt: the adapter is cheaper to ask but measurably worse, {worse}."
    if weak:
        cure = "Give the last phase more epochs, or more rows, before comparing prices."
        return f"Keep looking: with {name} {ours} the adapter is not of use yet, whatever it saves. {cure}"
    text, plain = payback_verdict(summary_economics(summary, cost), cost), summary.get("plain")
    if plain and (mine_is := numbers.compare_to(summary, "plain", metric)) != "better":
        trained = format_money(trained_cost(cost, summary["train"]["plain"]), cost.currency)
        saves = "as much" if plain["input_tokens"] == mine["input_tokens"] else "more"
        quality = "better" if mine_is == "worse" else "level"
        text += f" Plain fine-tuning saves {saves}, its quality is {quality}, and its training cost {trained}."
    return text


def payback_verdict(found: Economics, cost: CostConfig) -> str:
    """The verdict by money alone."""
    cached, uncached = found.requests_cached, found.requests_uncached
    without = "nothing is saved either" if uncached is None else f"the adapter is paid back {_after(uncached, cost)}"
    first, back = "Keep your prompt and cache its prefix: ", "training is paid back"
    if cached is None:
        first += "a request then costs no more than one to the adapter"
    elif cached > PATIENCE_MONTHS * cost.requests_per_month:
        first += f"against that, {back} only {_after(cached, cost)}"
    else:
        first = f"The adapter pays: against the full prompt with a cached prefix, {back} {_after(cached, cost)}"
    return f"{first}. Without such a cache, {without}."


def _after(requests: int, cost: CostConfig) -> str:
    """A number of requests, and the time in which so many come."""
    days = requests / cost.requests_per_month * 365.25 / 12
    time = "less than a day" if days < 1 else f"{days:.0f} days" if days < 60 else f"{days / 30.44:,.0f} months"
    return f"after {requests:,} requests ({time} at {cost.requests_per_month:,} a month)"
