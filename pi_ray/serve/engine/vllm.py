"""The engine `vllm`: Ray Serve LLM runs vLLM in a deployment of its own, which our Model deployment alone can reach.

    client -> Api (keys, limits) -> Model (names, verification, prompt ids) -> Vllm (Ray's LLMServer: tokens)

Ray's own OpenAI ingress (`build_openai_app`) is not used: it would answer without our keys, take prompts that training
never saw, and download adapters that nobody verified. Instead its LLMServer is called by handle, prompt ids in, token
ids out, and `VerifiedDownloader` gives it adapter folders that passed our checks on its machine.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayTaskError

from pi_ray.cluster import placement
from pi_ray.config import ModelConfig, RunConfig, ServeConfig
from pi_ray.errors import AdapterError, ConfigError, MissingExtraError, PiRayError
from pi_ray.models.base_files import resolve_base
from pi_ray.protocols import GenerationRequest, Token
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.replica_options import DEFAULT_MAX_LORAS, replica_options, router_options
from pi_ray.store.adapters import AdapterStore, check_unchanged
from pi_ray.store.verify import CONFIG_FILE, read_json
from pi_ray.train import vllm_options

DEPLOYMENT_NAME = "Vllm"
LOADED_MEANWHILE = "has already been loaded"  # in the error of vLLM that Ray passes on, before any token
BASE_ID = "base"  # the base model's name within the deployment


class VllmEngine:
    """Implements protocols.Engine over the deployment that `deployment` makes."""

    def __init__(self, model: ModelConfig, serve: ServeConfig):
        from ray.serve import get_deployment_handle
        from ray.serve.llm.openai_api_models import CompletionRequest

        self._handle: Any = get_deployment_handle(DEPLOYMENT_NAME)
        self._completion_request: Any = CompletionRequest

    @staticmethod
    def deployment(config: RunConfig) -> Any:
        """Ray's LLM deployment, to be bound beside Model. Raises MissingExtraError, or ConfigError without a GPU, which
        only vLLM's build for CPUs can do without.
        """
        import ray

        try:
            from ray.serve.llm import LLMConfig, build_llm_deployment

            on_cpus = vllm_options.is_for_cpus()
        except ImportError as error:
            cure = f"pip install 'pi-ray[vllm]', on a machine with a GPU ({str(error).splitlines()[0]})"
            raise MissingExtraError(f"serve.engine vllm needs vLLM: {cure}") from error
        come = placement.expects_gpus(config, "serve")  # nodes with GPUs, when the replica asks for them
        if not (on_cpus or come) and ray.is_initialized() and not ray.cluster_resources().get("GPU"):
            needs = "needs a GPU, and the cluster has none; take serve.engine transformers, or vLLM's build for CPUs"
            raise ConfigError(f"serve.engine vllm {needs}")
        rank = config.serve.max_lora_rank
        bound = {"model_downloader": partial(VerifiedDownloader, config.store, config.model, rank)}
        options, arguments = {"name": DEPLOYMENT_NAME}, LLMConfig(**llm_config_arguments(config, on_cpus))
        return build_llm_deployment(arguments, bind_kwargs=bound, override_serve_options=options)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Closing the iterator aborts the request in vLLM."""
        for again in (False, True):  # of an adapter's first requests at the same time Ray's server lets one load it
            try:
                async with aclosing(self._generate(request)) as tokens:
                    async for token in tokens:
                        yield token
                return
            except ValueError as error:
                if again or LOADED_MEANWHILE not in str(error):
                    raise

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Token]:
        adapter = adapter_id(request)
        handle = self._handle.options(stream=True, multiplexed_model_id=adapter)
        body = self._completion_request(model=adapter or BASE_ID, **completion_fields(request))
        response = handle.completions.remote(body)
        try:
            async for answer in response:
                for event in answer if isinstance(answer, list) else [answer]:
                    for token in parse_tokens(event, request.logprobs):
                        yield token
        except RayTaskError as error:  # whose text is a traceback with paths and addresses
            cause = error.cause
            raise (cause if isinstance(cause, PiRayError) else error) from error
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise


def llm_config_arguments(config: RunConfig, on_cpus: bool = False) -> dict[str, Any]:
    """Arguments of ray.serve.llm.LLMConfig: the model, what the store's adapters need, and the serve block's limits.

    `on_cpus`: vLLM is its build for CPUs.
    """
    model, limits = config.model, config.serve
    if limits.merge:
        cure = "leave it out, or take serve.engine transformers"
        raise ConfigError(f"serve.merge is not for serve.engine vllm, which keeps adapters apart from the base; {cure}")
    max_loras = limits.max_loras or DEFAULT_MAX_LORAS
    trained = min(config.train.lora.rank, limits.max_lora_rank)
    adapters, rank = _adapters_and_rank(AdapterStore(config.store, model), trained, limits.max_lora_rank)
    # In one batch: one more than there are, so that a new version can answer beside the old one.
    places = vllm_options.adapter_places(min(max_loras, adapters + 1), on_cpus)
    engine = {
        **vllm_options.engine_options(config, on_cpus),
        "max_num_seqs": limits.max_ongoing_requests, "enable_prefix_caching": limits.prefix_cache_mb != 0,
        "max_loras": places, "max_cpu_loras": max(max_loras, places),
        "max_lora_rank": rank, "structured_outputs_config": {"backend": "guidance"},
        **({"kv_cache_memory_bytes": cache} if (cache := _kv_cache_bytes(limits, on_cpus)) else {}),
    }
    deployment = replica_options(limits, {}, {}) | router_options(limits)  # no surge: seldom is there a spare GPU
    options = placement.worker_options(config, "serve")
    kept = ("num_cpus", "memory", "resources")  # no GPUs, which vLLM's workers take
    deployment["ray_actor_options"] = {key: value for key, value in options.items() if key in kept}
    if on_cpus:  # the one that Ray counts for the engine's worker is the replica's
        deployment["ray_actor_options"].setdefault("num_cpus", 0)
    del deployment["max_queued_requests"]  # the queue before Model is the bound
    return {
        "model_loading_config": {"model_id": BASE_ID, "model_source": resolve_base(model.base)},
        "engine_kwargs": engine,
        "lora_config": {"max_num_adapters_per_replica": max_loras},
        "deployment_config": deployment,
        "runtime_env": {"env_vars": vllm_options.environment(on_cpus)},
        **({"accelerator_config": {"kind": "cpu"}} if on_cpus else {}),
    }


def _kv_cache_bytes(limits: ServeConfig, on_cpus: bool) -> int:
    """Bytes of vLLM's cache of keys and values; 0: its own choice, which on CPUs would be nearly all of the memory."""
    if limits.kv_cache_mb:
        return limits.kv_cache_mb << 20
    return vllm_options.cpu_cache_bytes(limits.max_replicas) if on_cpus else 0


def _adapters_and_rank(store: AdapterStore, trained: int, limit: int) -> tuple[int, int]:
    """(number of adapters, smallest supported rank for them and for rank `trained`). Refused adapters have no say."""
    names, ranks = store.names(), [trained]
    for spec in (spec for name in names for spec in (name, f"{name}@latest")):
        try:
            ranks.append(read_json(store.open(spec).path / CONFIG_FILE)["r"])
        except AdapterError:
            continue
    allowed = [rank for rank in ranks if rank <= limit]
    rank = vllm_options.supported_rank(allowed)
    if rank is None:
        most = vllm_options.SUPPORTED_RANKS[-1]
        problem = f"serves adapters up to rank {most}, and there is one of rank {max(allowed)}"
        raise ConfigError(f"serve.engine vllm {problem}; lower serve.max_lora_rank, or take serve.engine transformers")
    return len(names), rank


def adapter_id(request: GenerationRequest) -> str:
    """The name by which every replica finds a verified folder .../<name>/<version> in the store; "" for the base.

    It ends with the manifest's hash, so that vLLM takes a version that was replaced in place for another adapter.
    """
    path = Path(request.adapter)
    return f"{path.parent.name}@{path.name}#{request.adapter_hash}" if request.adapter else ""


class VerifiedDownloader:
    """Takes the place of LLMServer's downloader: adapters come from our store and are verified on this machine."""

    def __init__(self, store: str, base: ModelConfig, max_rank: int, **_: Any):
        self._store, self._max_rank = AdapterStore(store, base), max_rank
        self._numbers = count(1)

    async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> SimpleNamespace:
        """The folder of the adapter that `adapter_id` names, with the fields of Ray's DiskMultiplexConfig."""
        spec, _, manifest_hash = lora_model_id.partition("#")
        adapter = await asyncio.to_thread(self._store.open, spec)
        settings = read_json(adapter.path / CONFIG_FILE)
        check_unchanged(adapter.path, manifest_hash)
        if settings.get("target_parameters"):
            cure = "'pi-ray export NAME --to merged' makes a base of it"
            raise AdapterError(f"{spec} adapts fused experts, which serve.engine vllm does not; {cure}")
        rank = settings["r"]
        if rank > self._max_rank:
            limit = f"this server takes up to {self._max_rank} (serve.max_lora_rank)"
            raise AdapterError(f"{spec} has rank {rank}; {limit}")
        return SimpleNamespace(
            model_id=lora_model_id, local_path=str(adapter.path), lora_assigned_int_id=next(self._numbers),
            max_total_tokens=None,
        )


def completion_fields(request: GenerationRequest) -> dict[str, Any]:
    """Fields of vLLM's completion request: prompt ids, so that its tokenizer is not used on the way in."""
    return {
        "prompt": request.prompt_ids, "stream": True, "max_tokens": request.max_new_tokens,
        "temperature": request.temperature, "top_p": request.top_p, "seed": request.seed, "stop": list(request.stop),
        "logprobs": request.logprobs, "add_special_tokens": False, "return_token_ids": True,
        "return_tokens_as_token_ids": request.logprobs is not None,
        **({"cache_salt": request.cache_salt} if request.cache_salt else {}),
        **({"structured_outputs": {"grammar": request.grammar}} if request.grammar else {}),
    }


def parse_tokens(event: Any, top: int | None) -> Iterator[Token]:
    """Tokens of vLLM's server-sent events, the `top` likeliest beside each. Raises the error of an error event."""
    if not isinstance(event, str):
        error = getattr(event, "error", event)
        raise _as_error(getattr(error, "message", error), getattr(error, "code", None))
    for data in (part.removeprefix("data: ") for part in event.split("\n\n")):
        if not data.strip() or data.strip() == "[DONE]":
            continue
        content = json.loads(data)
        if "error" in content:
            raise _as_error(content["error"].get("message"), content["error"].get("code"))
        for choice in content["choices"]:
            logprobs = choice.get("logprobs") or {}
            for place, token in enumerate(choice.get("token_ids") or []):
                yield Token(token) if top is None else _with_logprobs(token, logprobs, place, top)


def _as_error(message: Any, status: Any) -> Exception:
    """A refusal (400) where vLLM blames the request, such as a grammar that it does not take; else RuntimeError."""
    if isinstance(status, int) and 400 <= status < 500:
        return RefusedError(400, str(message))
    return RuntimeError(f"vLLM: {message}")


def _with_logprobs(token: int, logprobs: dict[str, Any], place: int, top: int) -> Token:
    likeliest = (logprobs["top_logprobs"][place] or {}).items()
    by_id = [(int(name.removeprefix("token_id:")), value) for name, value in likeliest]
    return Token(token, logprobs["token_logprobs"][place], tuple(sorted(by_id, key=lambda each: -each[1])[:top]))
