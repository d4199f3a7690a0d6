"""Prometheus metrics of the server, through Ray's own exporter: nothing is served on the public port.

Every node's Ray agent shows all metrics of its processes at its metrics export port, under the names of METRICS with
`ray_` before them. `Traffic` counts in the ingress: MetricsMiddleware around the whole API, `watch` around each
completion. `EngineMetrics` counts in a replica.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from pi_ray.config import CostConfig
from pi_ray.serve.engine.completion import Events

log = logging.getLogger("ray.serve")
SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that closed the connection before its answer was complete
MODEL = ("model", "version")
# name -> (kind, description, tags besides Serve's own: deployment, replica and application)
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "pi_ray_requests_total": (
        "Counter", "requests to the API by model, version and HTTP status; 499: the client left", (*MODEL, "status")),
    "pi_ray_latency_seconds": ("Histogram", "from a completion's first byte to its last", MODEL),
    "pi_ray_ttft_seconds": (
        "Histogram", "from a completion's first byte to the first text of its answer, or its end where it has none",
        MODEL),
    "pi_ray_prompt_tokens_total": ("Counter", "prompt tokens read by the model", MODEL),
    "pi_ray_completion_tokens_total": ("Counter", "tokens generated", MODEL),
    "pi_ray_saved_tokens_total": ("Counter", "tokens of template and examples that the adapter made needless", MODEL),
    "pi_ray_saved_money_total": (
        "Counter", "price of the saved tokens, by cost.input of the run file", (*MODEL, "currency")),
    "pi_ray_drift_total": (
        "Counter", "requests that still sent a full prompt, by the adapter that was asked for: 'stripped', or "
        "'drifted' where it is not the one trained on", (*MODEL, "kind")),
    "pi_ray_open_requests": ("Gauge", "completions in the server, running or waiting", ()),
    "pi_ray_queued_requests": ("Gauge", "completions that wait for a replica's slot", ()),
    "pi_ray_cold_start_seconds": ("Histogram", "wait of requests that came before any replica was up", ()),
    "pi_ray_adapter_hits_total": ("Counter", "requests that found their adapter in a replica's memory", ()),
    "pi_ray_adapter_misses_total": ("Counter", "requests whose adapter had to be loaded first", ()),
    "pi_ray_adapter_evictions_total": ("Counter", "adapters that made room for another one", ()),
    "pi_ray_adapters": ("Gauge", "adapters in a replica's memory", ()),
    "pi_ray_engine_waiting": ("Gauge", "requests in a replica's engine that are not decoding yet", ()),
    "pi_ray_engine_rows": ("Gauge", "rows that a replica's engine decodes at this moment", ()),
    "pi_ray_prefix_hit_tokens_total": ("Counter", "prompt tokens taken from a replica's prefix cache", ()),
    "pi_ray_replica_start_seconds": ("Gauge", "how long a replica took to load base model and tokenizer", ()),
}  # fmt: skip
ENGINE_COUNTERS = {
    key: f"pi_ray_{key}_total" for key in ("adapter_hits", "adapter_misses", "adapter_evictions", "prefix_hit_tokens")
}
FULL_PROMPTS = {"stripped", "drifted"}  # values of "prompt" in the first event of Completer.complete
ENGINE_GAUGES = {"adapters": "pi_ray_adapters", "waiting": "pi_ray_engine_waiting", "active": "pi_ray_engine_rows"}


@dataclass
class RequestRecord:
    """One HTTP request. `began`, `first`: monotonic seconds; `came`: wall clock, to be compared with a replica's."""

    completion: bool
    began: float = field(default_factory=time.monotonic)
    came: float = field(default_factory=time.time)
    tags: dict[str, str] = field(default_factory=lambda: {"model": "", "version": ""})
    status: int = 0
    queued: bool = False
    first: float | None = None


_current: ContextVar[RequestRecord | None] = ContextVar("pi_ray_request", default=None)


class Metrics:
    """METRICS in this process, each created on first use. `kinds` has the classes Counter, Gauge and Histogram."""

    def __init__(self, kinds: Any = None):
        self._kinds = kinds
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            if self._kinds is None:
                from ray.serve import metrics

                self._kinds = metrics
            kind, description, tags = METRICS[name]
            buckets = {"boundaries": SECONDS} if kind == "Histogram" else {}
            self._made[name] = getattr(self._kinds, kind)(name, description=description, tag_keys=tags, **buckets)
        return self._made[name]


class Traffic:
    """Counts the requests of one ingress replica. `limit_s` is the time that the API gives them."""

    def __init__(self, cost: CostConfig, limit_s: float, metrics: Metrics | None = None):
        self.cost = cost
        self.limit_s = limit_s
        self.metrics = metrics or Metrics()
        self._open: dict[int, RequestRecord] = {}

    @contextmanager
    def request(self, completion: bool) -> Iterator[RequestRecord]:
        """Counts one HTTP request; its status is 499 when no other was set by the end."""
        record = RequestRecord(completion)
        self._open[id(record)] = record
        token = _current.set(record)
        self._set_gauges()
        try:
            yield record
        except asyncio.CancelledError:
            record.status = CLIENT_CLOSED_REQUEST
            raise
        except Exception:
            record.status = record.status or 500
            raise
        finally:
            _current.reset(token)
            del self._open[id(record)]
            self._set_gauges()
            self.metrics["pi_ray_requests_total"].inc(
                tags={**record.tags, "status": str(record.status or CLIENT_CLOSED_REQUEST)}
            )
            if record.first is not None:
                self.metrics["pi_ray_latency_seconds"].observe(time.monotonic() - record.began, tags=record.tags)

    async def watch(self, events: Events, model: str, choices: int = 1) -> Events:
        """The same events of a completion, counted for `model`: a name that the store knows, or "".

        `choices` completions answer one prompt, which a client sends once: each counts its share of it.
        """
        record = _current.get() or RequestRecord(True)
        record.tags["model"], record.queued = model, True
        self._set_gauges()
        event: dict[str, Any] = {}
        try:
            async with aclosing(events):
                async for event in events:
                    self._count_event(record, event, choices)
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            if "finish" not in event:
                record.status = 408 if time.monotonic() - record.began >= self.limit_s else CLIENT_CLOSED_REQUEST
            raise
        except Exception as error:
            record.status = getattr(error, "status", 500)
            raise
        finally:
            record.queued = False
            self._set_gauges()

    def _count_event(self, record: RequestRecord, event: dict[str, Any], choices: int) -> None:
        if "fingerprint" in event:
            self._count_start(record, event, choices)
            return
        if record.first is None:
            record.first = time.monotonic()
            self.metrics["pi_ray_ttft_seconds"].observe(record.first - record.began, tags=record.tags)
        if "finish" in event:
            self.metrics["pi_ray_completion_tokens_total"].inc(event["completion_tokens"], tags=record.tags)

    def _count_start(self, record: RequestRecord, start: dict[str, Any], choices: int) -> None:
        """Count the first event: a replica took the request."""
        record.queued = False
        self._set_gauges()
        model, _, version = start["fingerprint"].partition("@")
        record.tags = {"model": model, "version": version}
        self.metrics["pi_ray_prompt_tokens_total"].inc(start["prompt_tokens"] / choices, tags=record.tags)
        if saved := start["saved"] / choices:
            self.metrics["pi_ray_saved_tokens_total"].inc(saved, tags=record.tags)
            self.metrics["pi_ray_saved_money_total"].inc(
                saved * self.cost.input / 1e6, tags={**record.tags, "currency": self.cost.currency}
            )
        if start.get("prompt") in FULL_PROMPTS:
            asked, _, version = start["adapter"].partition("@")
            self.metrics["pi_ray_drift_total"].inc(
                1 / choices, tags={"model": asked, "version": version, "kind": start["prompt"]}
            )
        if start.get("ready", 0) > record.came:
            waited = time.time() - record.came
            self.metrics["pi_ray_cold_start_seconds"].observe(waited)
            log.warning("cold start: a request waited %.1f s, since no replica was up", waited)

    def _set_gauges(self) -> None:
        records = [r for r in self._open.values() if r.completion]
        self.metrics["pi_ray_open_requests"].set(len(records))
        self.metrics["pi_ray_queued_requests"].set(sum(r.queued for r in records))


class MetricsMiddleware:
    """ASGI middleware outside all others: counts requests under /v1/ by status, those without a valid key too."""

    def __init__(self, app: Any, traffic: Traffic):
        self.app = app
        self.traffic = traffic

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        with self.traffic.request(scope["method"] == "POST") as record:
            async def watch(message: Any) -> None:
                if message["type"] == "http.response.start" and (not record.status or message["status"] >= 400):
                    record.status = message["status"]
                await send(message)

            await self.app(scope, receive, watch)


class EngineMetrics:
    """An engine's `stats()`, totals since its start and gauges, as metrics. A replica calls `update` now and then."""

    def __init__(self, engine: Any, metrics: Metrics | None = None):
        self.engine = engine
        self.metrics = metrics or Metrics()
        self._seen: dict[str, float] = {}

    def update(self) -> None:
        stats = self.engine.stats() if hasattr(self.engine, "stats") else {}
        for key, name in ENGINE_COUNTERS.items():
            if grown := stats.get(key, 0) - self._seen.get(key, 0):
                self.metrics[name].inc(grown)
                self._seen[key] = stats[key]
        for key, name in ENGINE_GAUGES.items():
            if key in stats:
                self.metrics[name].set(len(stats[key]) if isinstance(stats[key], list) else stats[key])
