"""Blocks `evaluate`, `cost` and `closed`: how a run is scored, prices, closed models behind OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pi_ray.config.block import Amount, Block, Count, Positive, check_plain_url, doc


class EvaluateConfig(Block):
    split: Literal["test", "dev"] = doc("test", "rows that are scored; dev for choosing settings")
    baseline: bool = doc(True, "also train and evaluate plain fine-tuning without a prompt")
    batch_size: Positive = 16
    max_new_tokens: Count = doc(0, "0: the longest answer of the data, plus a quarter")
    shots: Count = doc(0, "examples in the base model's full prompt; 0: as the first phase")
    latency_rows: Positive = doc(12, "rows timed one by one")
    bootstrap: Positive = doc(2000, "resamples for the 95% intervals")
    probe: bool = doc(True, "also measure forgetting (perplexity on other text) and the share of the template recited")
    samples: Positive = doc(10, "rows shown side by side in the report")


class CostConfig(Block):
    """Prices in money per million tokens, for the cost table and the break-even."""

    currency: str = "USD"
    input: Amount = doc(0.50, "per million input tokens")
    cached_input: Amount = doc(0.05, "per million input tokens read from a prefix cache")
    output: Amount = doc(1.50, "per million output tokens")
    training_hour: Amount = doc(2.00, "one worker for an hour")
    requests_per_month: Positive = 1_000_000


class ClosedConfig(Block):
    """A closed model, fine-tuned and asked through OpenAI's API or one like it, for train.backend.name: openai."""

    base_url: str = doc("", "URL of the service's API; empty: OpenAI's own")
    model: str = doc("gpt-4o-mini-2024-07-18", "the service's name of the base model")
    api_key_env: str = doc("OPENAI_API_KEY", "environment variable with the service's key")
    batch_size: Count = doc(0, "0: the service's choice")
    lr_multiplier: Amount = doc(0.0, "factor on the service's learning rate; 0: the service's choice")
    suffix: str = Field("pi-ray", pattern=r"^[a-z0-9-]{1,40}$", description="part of the tuned models' names")
    train_price: Amount = doc(3.00, "per million training tokens, as your service has it now")
    input_price: Amount = doc(0.30, "per million input tokens of evaluation")
    output_price: Amount = doc(1.20, "per million output tokens of evaluation")
    confirmed: bool = doc(False, "spend without asking; needed where nobody can be asked")
    poll_s: Amount = doc(10.0, "seconds between looks at a job; up to six times that while nothing happens")

    def model_post_init(self, context: Any) -> None:
        check_plain_url(self.base_url, "closed.base_url")
