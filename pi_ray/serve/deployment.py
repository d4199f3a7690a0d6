"""The two Serve deployments: `Model` replicas, each with an engine, and the ingress `Api`, which calls them by handle.

    client -> proxy -> Api (HTTP, key, limits) -> bounded queue -> Model (engine, adapters)

A request prefers a replica that has its adapter: the handle names it, and replicas report to Serve which ones they have
(`serve.multiplexed`, with the engine's own limit `serve.max_loras`). When those are busy, another one takes it.
"""

import asyncio
import logging
import sys
import time
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pi_ray.cluster import placement
from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError, ConfigError
from pi_ray.models import base_name
from pi_ray.protocols import GenerationRequest
from pi_ray.serve.engine import completion
from pi_ray.serve.engine.completion import Completer, Events
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.replica_options import DEFAULT_MAX_LORAS, replica_options, router_options
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.serve.http.api import create_api
from pi_ray.serve.http.streaming import StreamCoalescer
from pi_ray.serve.metrics import Metrics, MetricsMiddleware, Traffic
from pi_ray.store.adapters import AdapterStore
from pi_ray.train.replicas import replica_gpus

log = logging.getLogger("ray.serve")
API_REQUESTS = 1024  # open HTTP requests at the ingress; the queue before the model is the limit that clients meet
READY_S, READY_TIMEOUT_S = 30, 10  # /readyz: how recent a token must be, and how long one is waited for
# How soon the decoding thread gets Python's lock back from the threads that deliver tokens; Python's default is 0.005.
SWITCH_INTERVAL_S = 0.0002


class Model:
    """A replica: the base model, its adapters and the engine.

    `engine_deployment` is bound only so that Serve deploys it; an engine with a deployment of its own finds it by name.
    """

    def __init__(self, config: RunConfig, engine_deployment: Any = None):
        import joblib
        import torch

        from pi_ray.models import context_length, load_tokenizer
        from pi_ray.registry import engines

        began = time.monotonic()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if not torch.cuda.is_available():  # Ray gives an actor one thread; a CPU replica needs its share of the machine
            torch.set_num_threads(max(1, joblib.cpu_count() // config.serve.max_replicas))
        self.engine = engines[config.serve.engine](config.model, config.serve)
        self.completer = Completer(config, self.engine, load_tokenizer(config.model), context_length(config.model))
        if config.serve.merge:
            self.completer.merge(config.serve.merge)
        max_loras = config.serve.max_loras or DEFAULT_MAX_LORAS
        self._report_loaded = serve.multiplexed(max_num_models_per_replica=max_loras)(_report_loaded)
        self._metrics = Metrics()
        self._coalescer = StreamCoalescer()
        self._ready, seconds = time.time(), time.monotonic() - began
        self._metrics["pi_ray_replica_start_seconds"].set(seconds)
        log.info("replica ready after %.1f s", seconds)

    async def complete(self, request: CompletionRequest) -> Events:
        """Events of Completer.complete. A refusal is an event too, so that Ray logs no traceback."""
        try:
            async with aclosing(self.completer.complete(request)) as events:
                start = await anext(events)  # from here on the adapter is known and verified
                if start["fingerprint"] == serve.get_multiplexed_model_id():
                    await self._report_loaded(start["fingerprint"])
                yield {**start, "ready": self._ready}
                async with aclosing(self._coalescer.coalesce(events)) as pieces:  # which reads ahead of this stream
                    async for event in pieces:
                        yield event
        except RefusedError as error:
            yield {"refused": error.args}

    async def make_token(self) -> None:
        """Generate one token by the model that every request is answered with. Raises what the engine raises."""
        merged = self.completer.merged
        request = GenerationRequest([0], 1, str(merged.path) if merged else "")
        async with aclosing(self.engine.generate(request)) as tokens:
            await anext(tokens)

    def check_health(self) -> None:
        """Called by Serve every HEALTH_PERIOD_S; raises when the engine cannot answer any more."""
        self._metrics.report_engine(getattr(self.engine, "stats", dict)())
        if check := getattr(self.engine, "check", None):
            check()


async def _report_loaded(adapter: str) -> str:
    """Serve's list of a replica's adapters, evicted by the same rule as the engine's weights: least recently used."""
    return adapter


class HandleBackend:
    """CompletionBackend over the Model deployment. A full queue is 429, a lost replica 503."""

    def __init__(self, config: RunConfig, handle: Any, traffic: Traffic):
        self.config, self.handle, self.traffic = config, handle, traffic
        self.base = base_name(config.model.base)
        self.store = AdapterStore(config.store)
        self._clock = time.monotonic
        self._answered_at = float("-inf")  # when a replica last sent a token
        self._asking: asyncio.Task[None] | None = None

    async def check_ready(self) -> None:
        """Where no token came within READY_S, a replica is asked for a token, once for all who want to know.

        A server that may scale to nothing is not asked, which would keep a replica.
        """
        if not self.config.serve.min_replicas or self._clock() - self._answered_at < READY_S:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_for_token())
        await asyncio.shield(self._asking)

    async def _ask_for_token(self) -> None:
        try:
            await asyncio.wait_for(self.handle.make_token.remote(), READY_TIMEOUT_S)
        except BackPressureError:  # the replicas answer others, so many that the queue is full
            return
        except Exception as error:
            log.warning("not ready: %r", error)
            raise RefusedError(503, "no token was made lately", "server_error", "not_ready") from None
        self._answered_at = self._clock()

    async def models(self) -> list[str]:
        return await asyncio.to_thread(completion.served_models, self.config, self.store)

    async def complete(self, request: CompletionRequest) -> Events:
        name, version = await asyncio.to_thread(self._resolve, request)
        events = self._call_replica(request, f"{name}@{version}" if version else "")
        async with aclosing(self.traffic.watch(events, name, request.copies)) as watched:
            async for event in watched:
                yield event

    def _resolve(self, request: CompletionRequest) -> tuple[str, str]:
        """(adapter, version), (base model, ""), or ("", "") for a model that the replica will refuse.

        A refused name leaves no trace in Serve's router or in metrics.
        """
        adapter = completion.requested_adapter(request.model, self.config.model.base)
        if adapter is None or request.full_prompt:
            return self.base, ""
        merged, _, version = self.config.serve.merge.partition("@")
        if merged == adapter:
            return adapter, version
        try:
            name, version = self.store.resolve(adapter, request.sticky_key)
            return (name, version) if version in self.store.backend.versions(name) else ("", "")
        except AdapterError:
            return "", ""

    async def _call_replica(self, request: CompletionRequest, adapter: str) -> Events:
        response = self.handle.options(stream=True, multiplexed_model_id=adapter).complete.remote(request)
        try:
            async for event in response:
                if "refused" in event:
                    raise RefusedError(*event["refused"])
                if "fingerprint" not in event:  # the first event comes before any token
                    self._answered_at = self._clock()
                yield event
        except BackPressureError:
            message = "all slots and the queue are taken; come back later"
            raise RefusedError(429, message, "rate_limit_error", "queue_full") from None
        except (DeploymentUnavailableError, ray.exceptions.RayActorError):
            message = "the model is being restarted; come back later"
            raise RefusedError(503, message, "server_error", "unavailable") from None
        except (asyncio.CancelledError, GeneratorExit):  # the client left, or the time is over
            response.cancel()
            raise


def build_application(config: RunConfig, digest: str = "") -> serve.Application:
    """The Serve application of `config`. `digest` is keys.key_digest of the bearer key.

    The version of serve.merge is fixed here, so that replicas that start later merge the same one. Raises AdapterError,
    and ConfigError for a base model that the engine does not hold.
    """
    from pi_ray.registry import engines

    if config.serve.merge:
        name, version = AdapterStore(config.store).resolve(config.serve.merge)
        config = config.replace(**{"serve.merge": f"{name}@{version}"})
    engine_deployment = getattr(engines[config.serve.engine], "deployment", None)
    if engine_deployment:  # one light replica of Model before it checks and tokenises
        options, ongoing = replica_options(config.serve, {}, {}), config.serve.max_ongoing_requests
        del options["autoscaling_config"]
        options |= {"max_ongoing_requests": ongoing * config.serve.max_replicas, "max_surge_percent": 100}
        options["ray_actor_options"] = {"num_cpus": 0}
        model = serve.deployment(**options, num_replicas=1)(Model).bind(config, engine_deployment(config))
    else:
        cluster = ray.cluster_resources() if ray.is_initialized() else {}
        if placement.expects_gpus(config, "serve"):
            cluster.setdefault("GPU", 1)  # its node comes when the replica asks for it
        if cluster.get("GPU") and (gpus := replica_gpus(config)) > 1:
            raise ConfigError(
                f"{config.model.base} takes {gpus} GPUs (cluster.gpus_per_replica), and serve.engine transformers has "
                "one: take serve.engine vllm, which splits each layer over them"
            )
        options = replica_options(config.serve, cluster, placement.worker_options(config, "serve"))
        options |= router_options(config.serve)
        model = serve.deployment(**options)(Model).bind(config)

    def create_ingress() -> Any:  # called in the ingress replica
        traffic = Traffic(config.cost, config.serve.request_timeout_s)
        api = create_api(HandleBackend(config, serve.get_deployment_handle("Model"), traffic), config.serve, digest)
        api.add_middleware(MetricsMiddleware, traffic=traffic)
        return api

    ingress = serve.deployment(
        name="Api", num_replicas=config.serve.api_replicas, max_ongoing_requests=API_REQUESTS,
        max_queued_requests=API_REQUESTS, ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.serve.graceful_shutdown_timeout_s, max_surge_percent=100,
    )
    # the model is bound only so that Serve deploys it: create_ingress finds it by name
    return ingress(serve.ingress(create_ingress)()).bind(model)
