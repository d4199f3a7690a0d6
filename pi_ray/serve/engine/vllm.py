"""The engine `vllm`: Ray Serve LLM runs vLLM in a deployment of its own, which nothing but our Model deployment can reach.

    client -> Api (keys, limits) -> Model (names, verification, prompt ids) -> Vllm (Ray's LLMServer: tokens)

Ray's own OpenAI ingress (`build_openai_app`) is not used: it would answer without our keys, take prompts that training never saw, and download
adapters that nobody verified. Its server is asked by handle instead, with prompt ids, for token ids. Where it would download an adapter from a bucket,
`Verified` gives it the folder that passed our checks on that machine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from pi_ray.cluster import placement
from pi_ray.config import ModelConfig, RunConfig, ServeConfig
from pi_ray.errors import AdapterError, ConfigError, MissingExtraError
from pi_ray.protocols import GenerationRequest, Token
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.verify import CONFIG, read_json

NAME, BASE = "Vllm", "base"  # of the deployment, and of the base model within it
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
ADAPTERS = 16  # where serve.max_loras does not say
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_DO_NOT_TRACK": "1"}  # vLLM reports its use otherwise
MARK = "token_id:"


class VllmEngine:
    """Implements protocols.Engine over the deployment that `deployment` makes."""

    def __init__(self, model: ModelConfig, serve: ServeConfig):
        from ray.serve import get_deployment_handle

        self._handle = get_deployment_handle(NAME)

    @staticmethod
    def deployment(config: RunConfig) -> Any:
        """Ray's LLM deployment, to be bound beside Model. Raises MissingExtraError without vLLM, ConfigError without a GPU."""
        import ray

        try:
            from ray.serve.llm import LLMConfig, build_llm_deployment
        except ImportError as error:
            raise MissingExtraError(f"serve.engine vllm needs vLLM: pip install 'pi-ray[vllm]', on a machine with a GPU ({str(error).splitlines()[0]})") from error
        if ray.is_initialized() and not ray.cluster_resources().get("GPU"):
            raise ConfigError("serve.engine vllm needs a GPU, and the Ray cluster has none; take serve.engine transformers")
        verified = partial(Verified, config.store, config.model)
        return build_llm_deployment(LLMConfig(**options(config)), bind_kwargs={"model_downloader": verified}, override_serve_options={"name": NAME})

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Closing the iterator aborts the request in vLLM."""
        adapter = spec_of(request.adapter)
        response = self._handle.options(stream=True, multiplexed_model_id=adapter).completions.remote(_body(request, adapter or BASE))
        try:
            async for answer in response:
                for line in answer if isinstance(answer, list) else [answer]:
                    for token in tokens_of(line, request.logprobs):
                        yield token
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise


def options(config: RunConfig) -> dict[str, Any]:
    """Arguments of ray.serve.llm.LLMConfig: the model, what the store's adapters need, and the limits of the serve block."""
    from pi_ray.models import resolve
    from pi_ray.serve.engine.replica_options import replica_options

    model, limits = config.model, config.serve
    if limits.merge:
        raise ConfigError("serve.merge is not for serve.engine vllm, which keeps adapters apart from the base; leave it out, or take serve.engine transformers")
    held = limits.max_loras or ADAPTERS
    names, rank = _needs(AdapterStore(config.store, model), config.train.lora.rank)
    engine = {
        "dtype": "bfloat16" if model.dtype == "auto" else model.dtype,
        "trust_remote_code": False,
        "max_num_seqs": limits.max_ongoing_requests,
        "enable_prefix_caching": limits.prefix_cache_mb > 0,
        "enable_lora": True,
        "max_loras": min(held, names + 1),  # in one batch; one more than there are, so that a new version can answer beside the old one
        "max_cpu_loras": held,
        "max_lora_rank": rank,
        **({"revision": model.revision} if model.revision else {}),
        **({"quantization": "bitsandbytes"} if model.quantize else {}),
    }
    asked = {k: v for k, v in placement.options(config, "serve").items() if k in ("num_cpus", "memory", "resources")}  # vLLM's workers take the GPUs
    serve = {**replica_options(limits, {}, {}), "ray_actor_options": asked}  # no surge: seldom is there a spare GPU
    del serve["max_queued_requests"]  # the queue before Model is the bound
    return {
        "model_loading_config": {"model_id": BASE, "model_source": resolve(model.base)},
        "engine_kwargs": engine,
        "lora_config": {"max_num_adapters_per_replica": held},
        "deployment_config": serve,
        "runtime_env": {"env_vars": QUIET},
    }


def _needs(store: AdapterStore, trained: int) -> tuple[int, int]:
    """(number of adapters, rank that holds all of them and those that this run trains). Adapters that fail verification are not counted."""
    ranks = []
    for name in store.names():
        for spec in (name, f"{name}@latest"):
            try:
                ranks.append(read_json(store.open(spec).path / CONFIG)["r"])
            except AdapterError:
                continue
    most = max([trained, *ranks])
    fitting = next((rank for rank in RANKS if rank >= most), None)
    if fitting is None:
        raise ConfigError(f"serve.engine vllm serves adapters up to rank {RANKS[-1]}, and there is one of rank {most}; take serve.engine transformers")
    return len(store.names()), fitting


def spec_of(folder: str) -> str:
    """A verified folder .../<name>/<version> as the name by which every replica can find it in the store; "" for the base."""
    path = Path(folder)
    return f"{path.parent.name}@{path.name}" if folder else ""


@dataclass(frozen=True)
class Loaded:
    """What LLMServer hands to vLLM: which folder is the adapter `model_id`."""

    model_id: str
    local_path: str
    lora_assigned_int_id: int
    max_total_tokens: int | None = None


class Verified:
    """Stands where LLMServer has its downloader: the adapter comes from our store, checked on this machine."""

    def __init__(self, store: str, base: ModelConfig, **_: Any):
        self._store = AdapterStore(store, base)
        self._numbers = count(1)

    async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> Loaded:
        adapter = await asyncio.to_thread(self._store.open, lora_model_id)
        return Loaded(lora_model_id, str(adapter.path), next(self._numbers))


def _body(request: GenerationRequest, model: str) -> Any:
    """vLLM's completion request with prompt ids; no text goes through its tokenizer on the way in."""
    from ray.serve.llm.openai_api_models import CompletionRequest

    return CompletionRequest(model=model, **fields(request))


def fields(request: GenerationRequest) -> dict[str, Any]:
    return {
        "prompt": request.prompt_ids, "stream": True, "max_tokens": request.max_new_tokens, "temperature": request.temperature, "top_p": request.top_p,
        "seed": request.seed, "stop": list(request.stop), "logprobs": request.logprobs, "add_special_tokens": False, "return_token_ids": True,
        "return_tokens_as_token_ids": request.logprobs is not None,
    }  # fmt: skip


def tokens_of(line: Any, tops: int | None) -> Iterator[Token]:
    """The tokens of one server-sent event of vLLM's. Raises RuntimeError for an error event."""
    if not isinstance(line, str):
        raise RuntimeError(f"vLLM: {getattr(getattr(line, 'error', line), 'message', line)}")
    for data in (part.removeprefix("data: ") for part in line.split("\n\n")):
        if not data.strip() or data.strip() == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(f"vLLM: {event['error'].get('message')}")
        for choice in event["choices"]:
            marks = choice.get("logprobs") or {}
            for place, token in enumerate(choice.get("token_ids") or []):
                yield Token(token) if tops is None else _marked(token, marks, place, tops)


def _marked(token: int, marks: dict[str, Any], place: int, tops: int) -> Token:
    best = sorted(((int(name.removeprefix(MARK)), value) for name, value in (marks["top_logprobs"][place] or {}).items()), key=lambda each: -each[1])
    return Token(token, marks["token_logprobs"][place], tuple(best[:tops]))
