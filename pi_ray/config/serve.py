"""How adapters are served."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pi_ray.config.block import Block, Count, Positive


class ServeConfig(Block):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    engine: str = "transformers"
    min_replicas: Count = 1
    max_replicas: Positive = 1
    max_ongoing_requests: Positive = 8
    max_queued_requests: Positive = 16
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_new_tokens: Positive = Field(1028, description="upper bound of a request's max_tokens (paper A.2)")
    max_loras: Positive = Field(4, description="adapters kept in memory per replica")
    body_limit_bytes: Positive = 1_048_576
    api_key_env: str = Field("PI_RAY_API_KEY", description="environment variable with the bearer key; required off loopback")

    @model_validator(mode="after")
    def _replicas(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"serve.min_replicas {self.min_replicas} is above serve.max_replicas {self.max_replicas}")
        return self
