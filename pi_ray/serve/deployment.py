"""The two Serve deployments: `Model` replicas, each with its own engine, and the ingress `Api`, which reaches them through a handle.

    client -> proxy -> Api (HTTP, key, limits) -> bounded queue -> Model (engine, adapters)

A request prefers a replica that holds its adapter: the handle names the adapter, replicas tell Serve which ones they have
(`serve.multiplexed`, with the engine's own limit `serve.max_loras`). When those are busy, another one takes it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pi_ray.cluster import placement
from pi_ray.config import RunConfig
from pi_ray.errors import AdapterError
from pi_ray.models import base_name
from pi_ray.serve.engine.completion import Ask, Completer, RefusedError, adapter_of, served
from pi_ray.serve.engine.replica_options import front_options, replica_options, surge_options
from pi_ray.serve.http.api import create_api
from pi_ray.serve.http.stream_coalescing import Pace
from pi_ray.serve.metrics import EngineMetrics, Meter, Metrics, Traffic
from pi_ray.store.adapters import AdapterStore

log = logging.getLogger("ray.serve")
API_REQUESTS = 1024  # open HTTP requests at the ingress; the queue before the model is the bound that clients meet
SWITCH_S = 0.0002  # after which the decoding thread, back from an operation, gets Python's lock again from those that deliver tokens; 0.005 by default


class Model:
    """A replica: the base model, its adapters and the engine. `complete` streams events; refusals are events too, so that they log no traceback.

    `aside` is bound only so that Serve deploys it: an engine that runs in a deployment of its own finds that by name.
    """

    def __init__(self, config: RunConfig, aside: Any = None):
        import torch

        from pi_ray.models import context_length, load_tokenizer
        from pi_ray.registry import engines
        from pi_ray.serve.engine.scheduler import MOST_LORAS

        began = time.monotonic()
        sys.setswitchinterval(SWITCH_S)
        if not torch.cuda.is_available():  # Ray gives an actor one thread; a CPU replica needs its share of the machine
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.serve.max_replicas))
        self.engine = engines[config.serve.engine](config.model, config.serve)
        self.completer = Completer(config, self.engine, load_tokenizer(config.model), context_length(config.model))
        if config.serve.merge:
            self.completer.merge(config.serve.merge)
        self._hold = serve.multiplexed(max_num_models_per_replica=config.serve.max_loras or MOST_LORAS)(_hold)
        metrics = Metrics()
        self._metrics = EngineMetrics(self.engine, metrics)
        self._pace = Pace()
        self._ready = time.time()
        metrics["pi_ray_replica_start_seconds"].set(time.monotonic() - began)
        log.info("replica ready after %.1f s", time.monotonic() - began)

    async def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        try:
            async with aclosing(self.completer.complete(ask)) as events:
                start = await anext(events)  # from here on the adapter is known and verified
                if start["fingerprint"] == serve.get_multiplexed_model_id():
                    await self._hold(start["fingerprint"])
                yield {**start, "ready": self._ready}
                async for event in self._pace.keep(events):
                    yield event
        except RefusedError as error:
            yield {"refused": error.args}

    def check_health(self) -> None:
        """Serve asks every HEALTH_PERIOD_S; an engine that cannot answer any more raises, and the replica is replaced."""
        self._metrics.update()
        check = getattr(self.engine, "check", None)
        if check:
            check()


async def _hold(adapter: str) -> str:
    """What the replica tells Serve it has. The engine loads and evicts the weights by the same rule: least recently used, the same number."""
    return adapter


class HandleBackend:
    """api.Backend over the Model deployment. A full queue is 429, a lost replica 503; leaving the iterator cancels the generation."""

    def __init__(self, config: RunConfig, handle: Any, traffic: Traffic):
        self.config = config
        self.base = base_name(config.model.base)
        self.store = AdapterStore(config.store)
        self.handle = handle
        self.traffic = traffic

    async def models(self) -> list[str]:
        return await asyncio.to_thread(served, self.config, self.store)

    async def complete(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        name, version = await asyncio.to_thread(self._meant, ask)
        held = f"{name}@{version}" if version else ""
        async with aclosing(self.traffic.watch(self._events(ask, held), name, ask.choices)) as events:
            async for event in events:
                yield event

    def _meant(self, ask: Ask) -> tuple[str, str]:
        """(adapter, version), (base model, ""), or ("", "") for what the replica will refuse: it leaves no trace in Serve's router or in metrics."""
        adapter = adapter_of(ask.model, self.config.model.base)
        if adapter is None or ask.full_prompt:
            return self.base, ""
        if self.config.serve.merge.startswith(f"{adapter}@"):
            return adapter, self.config.serve.merge.partition("@")[2]
        try:
            name, version = self.store.resolve(adapter, ask.ticket)
            return (name, version) if version in self.store.place.versions(name) else ("", "")
        except AdapterError:
            return "", ""

    async def _events(self, ask: Ask, held: str) -> AsyncIterator[dict[str, Any]]:
        response = self.handle.options(stream=True, multiplexed_model_id=held).complete.remote(ask)
        try:
            async for event in response:
                if "refused" in event:
                    raise RefusedError(*event["refused"])
                yield event
        except BackPressureError:
            raise RefusedError(429, "all slots and the queue are taken; come back later", "rate_limit_error", "queue_full") from None
        except (DeploymentUnavailableError, ray.exceptions.RayActorError):
            raise RefusedError(503, "the model is being restarted; come back later", "server_error", "unavailable") from None
        except (asyncio.CancelledError, GeneratorExit):  # the client left, or the time is over
            response.cancel()
            raise


def build(config: RunConfig, digest: str = "") -> serve.Application:
    """The Serve application of `config`. `digest` (api.key_digest) is what the server keeps of the bearer key."""
    from pi_ray.registry import engines

    config = _pinned(config)
    aside = getattr(engines[config.serve.engine], "deployment", None)  # an engine may run in a deployment of its own, such as vLLM's
    options = front_options(config.serve) if aside else replica_options(config.serve, _resources(), placement.options(config, "serve"))
    model = serve.deployment(Model, **options)

    def api() -> Any:  # called in the ingress replica
        traffic = Traffic(config.cost, config.serve.request_timeout_s)
        made = create_api(HandleBackend(config, serve.get_deployment_handle("Model"), traffic), config.serve, digest)
        made.add_middleware(Meter, traffic=traffic)
        return made

    ingress = serve.deployment(
        serve.ingress(api)(type("Api", (_Ingress,), {})),
        name="Api",
        num_replicas=config.serve.api_replicas,
        max_ongoing_requests=API_REQUESTS,
        max_queued_requests=API_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.serve.graceful_shutdown_timeout_s,
        **surge_options(100),
    )
    return ingress.bind(model.bind(config, *([aside(config)] if aside else [])))


def _pinned(config: RunConfig) -> RunConfig:
    """With the version that serve.merge means now: every replica merges the same one, whenever it starts. Raises AdapterError where there is none."""
    if not config.serve.merge:
        return config
    name, version = AdapterStore(config.store).resolve(config.serve.merge)
    return config.replace(**{"serve.merge": f"{name}@{version}"})


class _Ingress:
    """Takes the bound Model, so that Serve deploys it; the routes find it by name."""

    def __init__(self, model: Any):
        self.model = model


def _resources() -> dict[str, float]:
    return ray.cluster_resources() if ray.is_initialized() else {}
