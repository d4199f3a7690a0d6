"""What comes of it: evaluation, cost, closed models."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pi_ray.config.block import PLAIN_URL, Block, Count, Money, Positive


class EvaluateConfig(Block):
    split: Literal["test", "dev"] = Field("test", description="rows that are scored; dev for choosing settings")
    baseline: bool = Field(True, description="also train and evaluate plain fine-tuning without a prompt")
    batch_size: Positive = 16
    max_new_tokens: Count = Field(0, description="0: the longest answer of the data, plus a quarter")
    shots: Count = Field(0, description="examples in the base model's full prompt; 0: as the first phase")
    latency_rows: Positive = Field(12, description="rows timed one by one")
    bootstrap: Positive = Field(2000, description="resamples for the 95% intervals")
    probe: bool = Field(True, description="also measure what was forgotten (perplexity on other text) and how much of the template is recited when asked")
    samples: Positive = Field(10, description="rows shown side by side in the report")


class CostConfig(Block):
    """Prices in money per million tokens, for the cost table and the break-even."""

    currency: str = "USD"
    input: Money = Field(0.50, description="per million input tokens")
    cached_input: Money = Field(0.05, description="per million input tokens read from a prefix cache")
    output: Money = Field(1.50, description="per million output tokens")
    training_hour: Money = Field(2.00, description="of one worker")
    requests_per_month: Positive = 1_000_000


class ClosedConfig(Block):
    """A closed model, fine-tuned and asked through OpenAI's API or one like it, for train.backend.name: openai."""

    base_url: str = Field("", description="of the service's API; empty: OpenAI's own")
    model: str = Field("gpt-4o-mini-2024-07-18", description="the service's name of the base model")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable with the service's key")
    batch_size: Count = Field(0, description="0: the service's choice")
    lr_multiplier: Annotated[float, Field(ge=0)] = Field(0.0, description="of the service's learning rate; 0: the service's choice")
    suffix: str = Field("pi-ray", pattern=r"^[a-z0-9-]{1,40}$", description="part of the tuned models' names")
    train_price: Money = Field(3.00, description="per million training tokens, as your service has it now")
    input_price: Money = Field(0.30, description="per million input tokens of evaluation")
    output_price: Money = Field(1.20, description="per million output tokens of evaluation")
    confirmed: bool = Field(False, description="spend without asking; needed where nobody can be asked")
    poll_s: Annotated[float, Field(ge=0)] = Field(10.0, description="seconds between looks at a job; up to six times that while nothing happens")

    @model_validator(mode="after")
    def _no_secret(self) -> ClosedConfig:
        if self.base_url and not re.fullmatch(PLAIN_URL, self.base_url):
            raise ValueError("closed.base_url must be an http or https URL without user, password or query; the key belongs in the environment")
        return self
