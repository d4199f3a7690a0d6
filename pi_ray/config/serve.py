"""How adapters are served."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pi_ray.config.block import Block, Count, Positive

Seconds = Annotated[float, Field(ge=0)]


class ServeConfig(Block):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    engine: str = "transformers"
    min_replicas: Count = 1
    max_replicas: Positive = 1
    max_ongoing_requests: Positive = 8
    max_queued_requests: Positive = 16
    api_replicas: Positive = Field(1, description="replicas of the HTTP side, which checks keys and bodies and hands out streams; each has a queue of its own")
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    upscale_delay_s: Seconds = Field(5.0, description="how long too many requests must go on before another replica starts; the first one after zero starts at once")
    downscale_delay_s: Seconds = Field(300.0, description="how long too few requests must go on before a replica stops")
    downscale_to_zero_delay_s: Seconds = Field(600.0, description="the same for the last replica, where serve.min_replicas is 0")
    graceful_shutdown_timeout_s: Seconds = Field(30.0, description="how long a replica that has to go may finish the requests it has")
    max_new_tokens: Positive = Field(1028, description="upper bound of a request's max_tokens (paper A.2)")
    max_loras: Count = Field(0, description="adapters kept in memory per replica, the least recently used dropped first; 0: as many as are asked for, at most 16")
    merge: str = Field("", description="one adapter of the store that is added into the base weights: no low-rank products per token, and no other adapter is served")
    prefix_cache_mb: Count = Field(512, description="memory per replica for keys and values of prompts that were read, so that a prompt which begins alike need not be read again; 0: none")
    prefill_tokens: Count = Field(0, description="prompt tokens that are read between two steps of running answers; 0: 256 on a CPU, 2048 on a GPU")
    body_limit_bytes: Positive = 1_048_576
    api_key_env: str = Field("PI_RAY_API_KEY", description="environment variable with the bearer key; off loopback this or keys_file is required")
    keys_file: str = Field("", description="YAML or JSON with more keys: the sha256 of each, whose it is, and the adapters it may use; 'pi-ray key NAME' makes one")
    drift_guard: bool = Field(
        True, description="recognise requests that still carry the prompt; publishing writes prompt.json for it, which holds the template. false: neither is done",
    )

    @model_validator(mode="after")
    def _replicas(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"serve.min_replicas {self.min_replicas} is above serve.max_replicas {self.max_replicas}")
        return self

    @property
    def places(self) -> int:
        """Answers that can run and wait at once in a server that nobody else asks."""
        return self.max_ongoing_requests * max(1, self.min_replicas) + self.max_queued_requests
