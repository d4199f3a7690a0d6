"""Block `serve`: how adapters are served."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pi_ray.config.block import Amount, Block, Count, Positive, doc, omit_default, refuse


class ServeConfig(Block):
    host: str = doc("127.0.0.1", "address to listen on; 0.0.0.0: all, with keys alone")
    port: Annotated[int, Field(ge=1, le=65535)] = doc(8000, "port of the API")
    engine: str = doc("transformers", "transformers: pi-ray's own; vllm: vLLM in Ray's deployment for it")
    min_replicas: Count = doc(1, "replicas without load; 0: none, and the first request waits for one")
    max_replicas: Positive = doc(1, "replicas under full load")
    max_ongoing_requests: Positive = doc(8, "requests that a replica answers at once, in one batch")
    max_queued_requests: Positive = doc(16, "requests that wait; further ones get 429")
    api_replicas: Positive = doc(1, "replicas of the HTTP side (keys, bodies, streams), each with its own queue")
    request_timeout_s: Annotated[float, Field(gt=0)] = doc(60.0, "longest a request may take; then 408")
    step_timeout_s: Annotated[float, Field(gt=0)] = doc(300.0, "a replica is replaced when a decoding step takes "
        "longer")
    upscale_delay_s: Amount = doc(5.0, "how long too many requests must go on before another replica starts; the "
        "first one after zero starts at once")
    downscale_delay_s: Amount = doc(300.0, "how long too few requests must go on before a replica stops")
    downscale_to_zero_delay_s: Amount = doc(600.0, "the same for the last replica, where serve.min_replicas is 0")
    graceful_shutdown_timeout_s: Amount = doc(30.0, "how long a replica that has to go may finish the requests it has")
    max_new_tokens: Positive = doc(1028, "upper bound of a request's max_tokens (paper A.2)")
    max_loras: Count = doc(0, "adapters in memory per replica (LRU); 0: as many as are asked for, at most 16")
    max_lora_rank: Positive = doc(64, "adapters of a higher rank are refused: memory grows with the highest loaded")
    max_lora_mb: Positive = doc(4096, "per replica, for adapters in memory: idle ones make room for others, and one "
        "that is larger alone is refused")
    merge: str = doc("", "adapter of the store, merged into the base weights: faster, and no other one is served")
    kv_cache_mb: Count = doc(0, "per replica, for keys and values of requests under way: others wait for room, and one "
        "that needs more alone is refused; 0: half of the memory that is free once the model is loaded")
    prefix_cache_mb: Count | Literal["auto"] = doc("auto", "per replica, for keys and values of prompts that begin "
        "alike; auto: an eighth of the memory that is free once the model is loaded, at least 512; 0: none")
    router: Literal["power_of_two", "prefix"] = doc("power_of_two", "how a request finds a replica: the less busy of "
        "two; or prefix, that which has read most of the prompt's beginning, for many long prompts that are sent whole")
    share_prefix_cache: bool = doc(False, "among clients of different keys: faster where prompts begin alike, but the "
        "time to a first token can tell what others sent; false: each key has its own")
    prefill_tokens: Count = doc(0, "prompt tokens read between two decoding steps; 0: 256 on a CPU, 2048 on a GPU")
    body_limit_bytes: Positive = doc(1_048_576, "largest body of a request; larger ones get 413")
    api_key_env: str = doc("PI_RAY_API_KEY", "variable with the bearer key; off loopback it or keys_file must be set")
    keys_file: str = doc("", "YAML or JSON with more keys: the sha256 of each, whose it is, and the adapters it may "
        "use; 'pi-ray key NAME' makes one")
    full_prompt: bool = doc(False, "let the key of api_key_env ask for pi_ray.full_prompt, whose answers can give the "
        "template away; a key of keys_file has a full_prompt of its own, a server without keys allows it")
    usage_dir: str = doc("", "folder that all HTTP replicas can write, where the tokens of each key are kept for its "
        "monthly_tokens")
    drift_guard: bool = doc(True, "recognise requests that still carry the prompt; publishing writes prompt.json for "
        "it, which holds the template. false: neither is done")
    knows: bool = omit_default(True, "publish knows.json, what the adapter knows of each unit of the template; it "
        "quotes the template and some queries. false: it stays in the run directory")

    def model_post_init(self, context: Any) -> None:
        refuse(self.min_replicas > self.max_replicas,
            f"serve.min_replicas {self.min_replicas} is above serve.max_replicas {self.max_replicas}")

    @property
    def max_in_flight(self) -> int:
        """Requests that an otherwise idle server can run and queue at once."""
        return self.max_ongoing_requests * max(1, self.min_replicas) + self.max_queued_requests
