"""Prometheus metrics of the server, through Ray's own exporter: nothing is served on the public port.

Every node's Ray agent shows its processes' METRICS at its metrics export port, with `ray_` before their names.
The ingress counts in `Traffic`, a replica with `Metrics.report_engine`.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ray.serve import metrics as serve_metrics

from pi_ray.config import CostConfig
from pi_ray.serve.engine.completion import Events

log = logging.getLogger("ray.serve")
SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that closed the connection before its answer was complete
MODEL = ("model", "version")
# name -> (kind, description, tags besides Serve's own: deployment, replica and application)
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "pi_ray_requests_total": ("Counter", "requests to the API; status 499: the client left", (*MODEL, "status")),
    "pi_ray_latency_seconds": ("Histogram", "from a completion's first byte to its last", MODEL),
    "pi_ray_ttft_seconds": ("Histogram", "from a completion's first byte to its first text, or to its end", MODEL),
    "pi_ray_prompt_tokens_total": ("Counter", "prompt tokens read by the model", MODEL),
    "pi_ray_completion_tokens_total": ("Counter", "tokens generated", MODEL),
    "pi_ray_saved_tokens_total": ("Counter", "tokens of template and examples that the adapter made needless", MODEL),
    "pi_ray_saved_money_total": ("Counter", "price of the saved tokens, by cost.input", (*MODEL, "currency")),
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
}
ENGINE_METRICS = {  # key of an engine's stats() -> metric
    "adapter_hits": "pi_ray_adapter_hits_total", "adapter_misses": "pi_ray_adapter_misses_total",
    "adapter_evictions": "pi_ray_adapter_evictions_total", "prefix_hit_tokens": "pi_ray_prefix_hit_tokens_total",
    "adapters": "pi_ray_adapters", "waiting": "pi_ray_engine_waiting", "active": "pi_ray_engine_rows",
}
FULL_PROMPTS = {"stripped", "drifted"}  # values of "prompt" in the first event of Completer.complete


@dataclass(eq=False)
class RequestRecord:
    """One HTTP request. `began` and `first`: monotonic seconds."""

    completion: bool
    began: float = field(default_factory=time.monotonic)
    tags: dict[str, str] = field(default_factory=lambda: {"model": "", "version": ""})
    status: int = 0
    queued: bool = False
    first: float | None = None


_current: ContextVar[RequestRecord | None] = ContextVar("pi_ray_request", default=None)


class Metrics(dict[str, Any]):
    """METRICS in this process, each created on first use. `kinds` has the classes Counter, Gauge and Histogram."""

    def __init__(self, kinds: Any = serve_metrics):
        super().__init__()
        self.kinds = kinds
        self._engine_totals: dict[str, float] = {}

    def __missing__(self, name: str) -> Any:
        kind, description, tags = METRICS[name]
        buckets = {"boundaries": SECONDS} if kind == "Histogram" else {}
        self[name] = getattr(self.kinds, kind)(name, description=description, tag_keys=tags, **buckets)
        return self[name]

    def count(self, name: str, amount: float, **tags: str) -> None:
        """Add to a counter; Ray's own raise an error for 0."""
        if amount:
            self[name].inc(amount, tags)

    def report_engine(self, stats: dict[str, Any]) -> None:
        """Take over an engine's `stats()`: totals since its start, which become counters, and gauges."""
        for key, name in ENGINE_METRICS.items():
            value = stats.get(key, 0)
            if METRICS[name][0] == "Counter":
                self.count(name, value - self._engine_totals.get(key, 0))
                self._engine_totals[key] = value
            elif key in stats:
                self[name].set(len(value) if isinstance(value, list) else value)


class Traffic:
    """Counts the requests of one ingress replica. `limit_s` is the time that the API gives them."""

    def __init__(self, cost: CostConfig, limit_s: float, metrics: Metrics | None = None):
        self.cost, self.limit_s = cost, limit_s
        self.metrics = Metrics() if metrics is None else metrics
        self._open: set[RequestRecord] = set()

    @contextmanager
    def request(self, completion: bool) -> Iterator[RequestRecord]:
        """Counts one HTTP request; its status is 499 when no other was set by the end."""
        record = RequestRecord(completion)
        self._open.add(record)
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
            self._open.remove(record)
            self._set_gauges()
            status = str(record.status or CLIENT_CLOSED_REQUEST)
            self.metrics.count("pi_ray_requests_total", 1, **record.tags, status=status)
            if record.first is not None:
                self.metrics["pi_ray_latency_seconds"].observe(time.monotonic() - record.began, record.tags)

    async def watch(self, events: Events, model: str, copies: int = 1) -> Events:
        """The same events of a completion, counted for `model`: a name that the store knows, or "".

        `copies` completions answer one prompt, which a client sends once: each counts its share of it.
        """
        record = _current.get() or RequestRecord(True)
        record.tags["model"], record.queued = model, True
        self._set_gauges()
        event: dict[str, Any] = {}
        try:
            async with aclosing(events):
                async for event in events:
                    if "fingerprint" in event:
                        self._count_start(record, event, copies)
                    else:
                        self._count_piece(record, event)
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            if "finish" not in event and record.status < 400:  # else another answer failed, and this one ends with it
                record.status = 408 if time.monotonic() - record.began >= self.limit_s else CLIENT_CLOSED_REQUEST
            raise
        except Exception as error:
            record.status = getattr(error, "status", 500)
            raise
        finally:
            record.queued = False
            self._set_gauges()

    def _count_start(self, record: RequestRecord, start: dict[str, Any], copies: int) -> None:
        """Count the first event: a replica took the request."""
        record.queued = False
        self._set_gauges()
        model, _, version = start["fingerprint"].partition("@")
        record.tags = tags = {"model": model, "version": version}
        saved, cost = start["saved"] / copies, self.cost
        self.metrics.count("pi_ray_prompt_tokens_total", start["prompt_tokens"] / copies, **tags)
        self.metrics.count("pi_ray_saved_tokens_total", saved, **tags)
        self.metrics.count("pi_ray_saved_money_total", saved * cost.input / 1e6, **tags, currency=cost.currency)
        if start.get("prompt") in FULL_PROMPTS:
            asked, _, version = start["adapter"].partition("@")
            self.metrics.count("pi_ray_drift_total", 1 / copies, model=asked, version=version, kind=start["prompt"])
        waited = time.monotonic() - record.began
        if start.get("ready", 0) > time.time() - waited:
            self.metrics["pi_ray_cold_start_seconds"].observe(waited)
            log.warning("cold start: a request waited %.1f s, since no replica was up", waited)

    def _count_piece(self, record: RequestRecord, event: dict[str, Any]) -> None:
        if record.first is None:
            record.first = time.monotonic()
            self.metrics["pi_ray_ttft_seconds"].observe(record.first - record.began, record.tags)
        self.metrics.count("pi_ray_completion_tokens_total", event.get("completion_tokens", 0), **record.tags)

    def _set_gauges(self) -> None:
        completions = [r for r in self._open if r.completion]
        self.metrics["pi_ray_open_requests"].set(len(completions))
        self.metrics["pi_ray_queued_requests"].set(sum(r.queued for r in completions))


class MetricsMiddleware:
    """ASGI middleware outside all others: counts requests under /v1/ by status, those without a valid key too."""

    def __init__(self, app: Any, traffic: Traffic):
        self.app, self.traffic = app, traffic

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        with self.traffic.request(scope["method"] == "POST") as record:
            async def watch(message: Any) -> None:
                if message["type"] == "http.response.start" and (not record.status or message["status"] >= 400):
                    record.status = message["status"]
                await send(message)

            await self.app(scope, receive, watch)
