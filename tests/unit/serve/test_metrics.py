"""What is counted of requests and engines; and that the dashboard asks for nothing that is not there."""

import asyncio
import json
import re
from contextlib import aclosing, suppress
from pathlib import Path

import httpx
import pytest

from pi_ray.config import CostConfig, ServeConfig
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.serve.http.api import create_api
from pi_ray.serve.http.keys import key_digest
from pi_ray.serve.metrics import ENGINE_METRICS, FULL_PROMPTS, METRICS, Metrics, MetricsMiddleware, Traffic
from tests.unit.fake_metrics import Kinds

REPO = Path(__file__).parents[3]
START = {
    "model": "colours", "fingerprint": "colours@v0002", "adapter": "colours@v0002", "prompt": "internalised",
    "prompt_tokens": 30, "saved": 600,
}
TAGS = (("model", "colours"), ("version", "v0002"))


class Backend:
    """Answers with `events`; a number among them is a wait in seconds, an exception is raised."""

    base = "base"

    def __init__(self, traffic, *events, name="colours"):
        self.traffic, self.events, self.name = traffic, events, name

    async def models(self):
        return ["base", "colours"]

    async def complete(self, ask):
        async with aclosing(self.traffic.watch(self._events(), self.name, ask.copies)) as events:
            async for event in events:
                yield event

    async def _events(self):
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, int | float):
                await asyncio.sleep(event)
            else:
                yield event


def call(*events, key="", timeout=60, name="colours", path="/v1/chat/completions", price=2.0, **rest):
    """(status, what was counted) of one request."""
    kinds = Kinds()
    traffic = Traffic(CostConfig(input=price, currency="EUR"), timeout, Metrics(kinds))
    api = create_api(Backend(traffic, *events, name=name), ServeConfig(request_timeout_s=timeout), key_digest(key))
    api.add_middleware(MetricsMiddleware, traffic=traffic)

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://localhost") as http:
            body = {"model": "colours", "messages": [{"role": "user", "content": "x"}], **rest}
            return (await http.post(path, json=body) if path != "/healthz" else await http.get(path)).status_code

    return asyncio.run(send()), kinds


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_counts_tokens_latency_and_savings(stream):
    status, seen = call(
        START, {"text": "k4"}, {"text": " k5"}, {"finish": "stop", "completion_tokens": 7}, stream=stream
    )
    assert status == 200
    assert seen.of("pi_ray_requests_total", *TAGS, ("status", "200")) == 1
    assert seen.of("pi_ray_prompt_tokens_total", *TAGS) == 30
    assert seen.of("pi_ray_completion_tokens_total", *TAGS) == 7
    assert seen.of("pi_ray_saved_tokens_total", *TAGS) == 600
    assert seen.of("pi_ray_saved_money_total", *TAGS, ("currency", "EUR")) == pytest.approx(600 * 2.0 / 1e6)
    assert len(seen.of("pi_ray_latency_seconds", *TAGS)) == len(seen.of("pi_ray_ttft_seconds", *TAGS)) == 1
    assert seen.of("pi_ray_ttft_seconds", *TAGS)[0] <= seen.of("pi_ray_latency_seconds", *TAGS)[0]
    assert seen.of("pi_ray_open_requests") == seen.of("pi_ray_queued_requests") == 0
    assert seen.of("pi_ray_cold_start_seconds") is None and not any(
        name == "pi_ray_drift_total" for name, _ in seen.values
    )


def test_a_price_of_zero_is_counted_as_no_money():
    status, seen = call(START, {"finish": "stop", "completion_tokens": 1}, price=0.0)
    assert status == 200 and seen.of("pi_ray_saved_tokens_total", *TAGS) == 600
    assert seen.of("pi_ray_saved_money_total", *TAGS, ("currency", "EUR")) is None


def test_an_empty_answer_has_latency_and_ttft():
    _, seen = call(START, {"finish": "stop", "completion_tokens": 1})
    assert len(seen.of("pi_ray_latency_seconds", *TAGS)) == len(seen.of("pi_ray_ttft_seconds", *TAGS)) == 1


def test_an_exception_before_the_completion_counts_as_500():
    kinds = Kinds()
    traffic = Traffic(CostConfig(), 60, Metrics(kinds))
    with pytest.raises(ValueError), traffic.request(False):
        raise ValueError("a bug")
    assert kinds.of("pi_ray_requests_total", ("model", ""), ("version", ""), ("status", "500")) == 1


def test_each_prompt_of_a_list_counts_whole():
    _, seen = call(
        START, {"text": "k4"}, {"finish": "stop", "completion_tokens": 7}, path="/v1/completions",
        prompt=["red", "blue", "green"],
    )
    assert seen.of("pi_ray_prompt_tokens_total", *TAGS) == pytest.approx(90)
    assert seen.of("pi_ray_saved_tokens_total", *TAGS) == pytest.approx(1800)


def test_answers_that_end_with_a_failed_one_do_not_hide_its_status():
    kinds = Kinds()
    traffic = Traffic(CostConfig(), 60, Metrics(kinds))

    async def events(error):
        yield START
        await asyncio.sleep(0)
        raise error

    async def use():
        with suppress(RefusedError), traffic.request(True):
            for error in (RefusedError(503, "lost"), asyncio.CancelledError()):
                with suppress(RefusedError, asyncio.CancelledError):
                    async for _ in traffic.watch(events(error), "colours"):
                        pass
            raise RefusedError(503, "lost")

    asyncio.run(use())
    assert kinds.of("pi_ray_requests_total", *TAGS, ("status", "503")) == 1


def test_n_choices_count_their_prompt_once():
    _, seen = call(START, {"text": "k4"}, {"finish": "stop", "completion_tokens": 7}, n=3)
    assert seen.of("pi_ray_prompt_tokens_total", *TAGS) == pytest.approx(30)
    assert seen.of("pi_ray_saved_tokens_total", *TAGS) == pytest.approx(600)
    assert seen.of("pi_ray_completion_tokens_total", *TAGS) == 21
    assert seen.of("pi_ray_requests_total", *TAGS, ("status", "200")) == 1


def test_refusals_are_counted_by_status_and_unknown_models_have_no_label():
    full = RefusedError(429, "full", "rate_limit_error")
    assert call(full)[1].of("pi_ray_requests_total", ("model", "colours"), ("version", ""), ("status", "429")) == 1
    assert (
        call(RefusedError(404, "no"), name="")[1].of(
            "pi_ray_requests_total", ("model", ""), ("version", ""), ("status", "404")
        )
        == 1
    )
    status, seen = call(START, key="a-key")
    assert status == 401 and seen.of("pi_ray_requests_total", ("model", ""), ("version", ""), ("status", "401")) == 1
    assert call(path="/healthz")[1].values == {}


def test_timeouts_count_as_408_and_disconnects_as_499():
    status, seen = call(START, 30, timeout=0.05)
    assert status == 408 and seen.of("pi_ray_requests_total", *TAGS, ("status", "408")) == 1
    status, seen = call(START, {"text": "k4"}, 30, timeout=0.5, stream=True)
    # the stream's last event says so
    assert status == 200 and seen.of("pi_ray_requests_total", *TAGS, ("status", "408")) == 1
    kinds = Kinds()
    traffic = Traffic(CostConfig(), 60, Metrics(kinds))
    backend = Backend(traffic, START, {"text": "k4"}, 30)

    async def leave():
        with traffic.request(True):
            async with aclosing(backend.complete(CompletionRequest("colours", "x"))) as events:
                async for event in events:
                    if "text" in event:
                        assert kinds.of("pi_ray_open_requests") == 1
                        return

    asyncio.run(leave())
    assert kinds.of("pi_ray_requests_total", *TAGS, ("status", "499")) == 1 and kinds.of("pi_ray_open_requests") == 0


def test_queued_requests_gauge_drops_when_a_replica_starts():
    kinds = Kinds()
    traffic = Traffic(CostConfig(), 60, Metrics(kinds))
    queued = []

    async def events():
        queued.append(kinds.of("pi_ray_queued_requests"))
        yield START

    async def use():
        with traffic.request(True):
            async for _ in traffic.watch(events(), "colours"):
                queued.append(kinds.of("pi_ray_queued_requests"))

    asyncio.run(use())
    assert queued == [1, 0]


@pytest.mark.parametrize("kind", sorted(FULL_PROMPTS))
def test_full_prompts_are_counted_as_stripped_or_drifted(kind):
    # the base model reads a changed prompt; the adapter is what it was meant for
    answers = "base" if kind == "drifted" else "colours@v0002"
    _, seen = call({**START, "prompt": kind, "fingerprint": answers}, {"finish": "stop", "completion_tokens": 1})
    assert seen.of("pi_ray_drift_total", *TAGS, ("kind", kind)) == 1


def test_a_request_older_than_its_replica_is_a_cold_start(caplog):
    _, seen = call({**START, "ready": 4e9}, {"finish": "stop", "completion_tokens": 1})
    assert len(seen.of("pi_ray_cold_start_seconds")) == 1 and "cold start" in caplog.text
    assert (
        call({**START, "ready": 1e9}, {"finish": "stop", "completion_tokens": 1})[1].of("pi_ray_cold_start_seconds")
        is None
    )


def test_engine_totals_become_counters_and_lists_are_counted():
    kinds = Kinds()
    metrics = Metrics(kinds)
    for hits, held in ((3, ["a"]), (3, ["a", "b"]), (5, ["b"])):
        metrics.report_engine({"adapter_hits": hits, "adapters": held, "waiting": 2, "something_else": 1})
    assert kinds.of("pi_ray_adapter_hits_total") == 5
    assert (kinds.of("pi_ray_adapters"), kinds.of("pi_ray_engine_waiting")) == (1, 2)
    empty = Kinds()
    Metrics(empty).report_engine({})  # an engine that counts nothing
    assert empty.values == {}


def test_engine_stats_have_every_key_of_engine_metrics(tiny_model):
    from pi_ray.config import ModelConfig
    from pi_ray.serve.engine.engine import TransformersEngine

    engine = TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig())
    try:
        assert set(ENGINE_METRICS) <= set(engine.stats())
    finally:
        engine.close()


def test_dashboard_shows_exactly_the_metrics_with_their_tags():
    text = (REPO / "serve" / "grafana.json").read_text()
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and all(
        target["expr"] for panel in panels for target in panel["targets"]
    )
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"\bray_(pi_ray_\w+)", text)}
    assert shown == set(METRICS)
    for panel in panels:
        for target in panel["targets"]:
            for name, tags in re.findall(r"ray_(pi_ray_\w+?)(?:_bucket|_count)?\{(.*?)\}", target["expr"]):
                assert set(re.findall(r"(\w+)=", tags)) <= set(METRICS[name][2])
            for by in re.findall(r"by \((.*?)\)", target["expr"]):
                named = re.search(r"ray_(pi_ray_\w+?)(?:_bucket|_count)?[{\[)]", target["expr"]).group(1)
                assert set(by.split(", ")) <= {*METRICS[named][2], "le"}
