"""The Model deployment as the ingress sees it, without Ray: routing by adapter, failures; and Serve's options."""

import asyncio
import sys
import threading
from contextlib import aclosing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pi_ray.config import CostConfig, ModelConfig, RunConfig, ServeConfig
from pi_ray.errors import AdapterError, ConfigError
from pi_ray.models import load_tokenizer
from pi_ray.run import object_storage
from pi_ray.run.artifact import write_atomic
from pi_ray.serve import deployment
from pi_ray.serve.engine import replica_options
from pi_ray.serve.engine.completion import Completer
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.serve.http.streaming import StreamCoalescer
from pi_ray.serve.metrics import Metrics, Traffic
from tests.lora import put_in_store
from tests.unit.fake_bucket import Bucket, Clock
from tests.unit.fake_metrics import Kinds

START = {
    "model": "m", "fingerprint": "colours@v0001", "adapter": "colours@v0001", "prompt": "internalised",
    "prompt_tokens": 3, "saved": 0,
}


class Handle:
    """Stands in for Serve's handle: streams `events` or raises the exception among them."""

    def __init__(self, *events):
        self.events, self.held, self.cancelled = events, [], False

    def options(self, stream, multiplexed_model_id):
        assert stream
        self.held.append(multiplexed_model_id)
        return self

    @property
    def complete(self):
        return self

    def remote(self, ask):
        return self

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            yield event


@pytest.fixture(scope="module")
def store(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    put_in_store(store, "colours", tiny_model, version="v0001")
    put_in_store(store, "colours", tiny_model, version="v0002")
    return store


@pytest.fixture
def config(store, tiny_model):
    return RunConfig(name="t", store=str(store), model=ModelConfig(base=str(tiny_model)))


def ingress(config, handle):
    return deployment.HandleBackend(config, handle, Traffic(CostConfig(), 60, Metrics(Kinds())))


def complete(config, handle, ask, leave_after=None, backend=None):
    backend = backend or ingress(config, handle)
    seen = []

    async def use():
        async with aclosing(backend.complete(ask)) as events:
            async for event in events:
                seen.append(event)
                if len(seen) == leave_after:
                    return

    asyncio.run(use())
    return seen


def test_requests_are_routed_by_adapter_and_version(config, tiny_model):
    handle = Handle(START)
    for model in (
        "colours", f"{tiny_model.name}:colours", "colours@v0001", "colours@latest", tiny_model.name, "unknown",
        "unknown@v0001", "colours@v0009", "../colours", "x" * 9000,
    ):
        complete(config, handle, CompletionRequest(model, "q"))
    assert handle.held == ["colours@v0002", "colours@v0002", "colours@v0001", "colours@v0002", "", "", "", "", "", ""]
    complete(config, handle, CompletionRequest("colours", "q", full_prompt=True))  # the base model answers that
    assert handle.held[-1] == ""


def test_ingress_and_replica_choose_the_same_version_during_a_canary(config, store, tiny_model):
    """The ingress and the replica's Completer decide by themselves, each from the request and the store alone."""
    config = config.replace(**{"prompt.chat": "chatml"})
    completer = Completer(config, None, load_tokenizer(config.model), 512)

    async def decision(request):
        async with aclosing(completer.complete(request)) as events:
            return (await anext(events))["fingerprint"]

    requests = [CompletionRequest("colours", "q", sticky_key=f"t{i}") for i in range(40)]
    base = tiny_model.name
    others = (f"{base}:colours", "colours@prod", "colours@v0001", "colours@v0002", "colours@latest", base)
    requests += [CompletionRequest(model, "q", sticky_key=f"t{i}") for model in others for i in (0, 1)]
    write_atomic(
        store / "colours" / "aliases.json",
        '{"prod": {"version": "v0001", "canary": "v0002", "percent": 50, "before": []}}',
    )
    handle = Handle(START)
    try:
        for request in requests:
            complete(config, handle, request)
        decided = [asyncio.run(decision(request)) for request in requests]
    finally:
        (store / "colours" / "aliases.json").unlink()
    assert [adapter or base for adapter in handle.held] == decided
    assert set(handle.held[:40]) == {"colours@v0001", "colours@v0002"}


def test_remote_store_is_cached_and_read_off_the_event_loop(config, store, monkeypatch):
    bucket, handle, threads, asked = Bucket(store.parent), Handle(START), set(), []
    monkeypatch.setattr(object_storage, "open_file_system", lambda url: (bucket, store.name))
    monkeypatch.setattr(
        bucket, "_check", lambda check=bucket._check: threads.add(threading.current_thread()) or check()
    )
    backend = ingress(config.replace(store="s3://bucket/adapters"), handle)
    backend.store.backend._clock = Clock()
    for _ in range(2):
        assert asyncio.run(backend.models()) == [backend.base, "colours"]
        for model in ("colours", "colours@v0001", "unknown"):
            complete(config, handle, CompletionRequest(model, "q"), backend=backend)
        asked.append(bucket.asked)
    assert asked[0] == asked[1] > 0
    bucket.down = True
    backend.store.backend._clock.now = 100
    for _ in range(5):
        complete(config, handle, CompletionRequest("colours", "q"), backend=backend)
        asyncio.run(backend.models())
    assert (
        bucket.asked == asked[0] + 1
        and handle.held == ["colours@v0002", "colours@v0001", ""] * 2 + ["colours@v0002"] * 5
    )
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    "failure, status",
    [
        (BackPressureError(num_queued_requests=4, max_queued_requests=4), 429),
        (DeploymentUnavailableError(deployment_id=None), 503),
        (ray.exceptions.RayActorError(), 503),
    ],
)
def test_full_queue_is_429_and_lost_replica_is_503(config, failure, status):
    with pytest.raises(RefusedError) as told:
        complete(config, Handle(failure), CompletionRequest("colours", "q"))
    assert told.value.status == status


def test_refusal_of_a_replica_keeps_status_and_code(config):
    with pytest.raises(RefusedError) as told:
        complete(
            config, Handle({"refused": (404, "no adapter", "invalid_request_error", "model_not_found", "model")}),
            CompletionRequest("unknown", "q"),
        )
    assert (told.value.status, told.value.code) == (404, "model_not_found")


def test_closing_the_stream_cancels_the_replica_call(config):
    handle = Handle(START, {"text": "a"}, {"text": "b"})
    assert len(complete(config, handle, CompletionRequest("colours", "q"), leave_after=2)) == 2
    assert handle.cancelled


def test_closing_a_replicas_stream_ends_the_generation_at_once(monkeypatch):
    """The stream reads ahead of its caller, so closing it meets a read that is under way."""
    states = []

    class Endless:
        async def complete(self, request):
            states.append("open")
            try:
                yield START
                while True:
                    yield {"text": "a"}
                    await asyncio.sleep(0.001)
            finally:
                states.append("closed")

    model = deployment.Model.__new__(deployment.Model)
    model.completer, model._coalescer, model._ready = Endless(), StreamCoalescer(), 0.0
    monkeypatch.setattr(deployment.serve, "get_multiplexed_model_id", str)

    async def leave():
        stream = model.complete(CompletionRequest("colours", "q"))
        for _ in range(3):
            await anext(stream)
        await stream.aclose()
        return list(states), model._coalescer.streams

    assert asyncio.run(leave()) == (["open", "closed"], 0)


class Replica:
    """Stands in for the handle's `make_token`: an answer, an exception, or an event to wait for."""

    def __init__(self):
        self.calls, self.outcome = 0, None

    @property
    def make_token(self):
        return self

    async def remote(self):
        self.calls += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if self.outcome:
            await self.outcome.wait()


def test_a_server_is_ready_when_a_token_was_made_lately(config, monkeypatch):
    monkeypatch.setattr(deployment, "READY_TIMEOUT_S", 0.01)
    replica, clock = Replica(), Clock()
    backend = ingress(config, replica)
    backend._clock = clock

    async def states():
        found = []
        full = BackPressureError(num_queued_requests=4, max_queued_requests=4)
        for at, outcome in (
            (0, None), (29, RuntimeError("gone")), (31, RuntimeError("gone")), (32, asyncio.Event()), (33, full),
            (34, RuntimeError("gone")), (35, None),
        ):
            clock.now, replica.outcome = at, outcome
            try:
                await backend.check_ready()
                found.append((200, replica.calls))
            except RefusedError as error:
                found.append((error.status, replica.calls))
        return found

    assert asyncio.run(states()) == [(200, 1), (200, 1), (503, 2), (503, 3), (200, 4), (503, 5), (200, 6)]


def test_many_who_ask_whether_a_server_is_ready_cost_one_token(config):
    replica = Replica()
    backend = ingress(config, replica)

    async def many():
        replica.outcome = asyncio.Event()
        asked = [asyncio.create_task(backend.check_ready()) for _ in range(50)]
        await asyncio.sleep(0)
        replica.outcome.set()
        await asyncio.gather(*asked)

    asyncio.run(many())
    assert replica.calls == 1
    idle = ingress(config.replace(**{"serve.min_replicas": 0}), replica)
    asyncio.run(idle.check_ready())
    assert replica.calls == 1, "a server that may scale to nothing"


def test_answers_keep_a_server_ready_without_further_tokens_and_their_beginnings_do_not(config):
    for events, ready in (((START, {"text": "a"}), True), ((START,), False)):
        handle = Handle(*events)  # which knows no make_token
        backend = ingress(config, handle)
        complete(config, handle, CompletionRequest("colours", "q"), backend=backend)
        with nullcontext() if ready else pytest.raises(RefusedError, match="no token was made lately"):
            asyncio.run(backend.check_ready())


@pytest.mark.parametrize("limits", [{}, {"min_replicas": 0, "max_replicas": 4}, {"min_replicas": 2, "max_replicas": 2}])
def test_autoscaling_options_are_valid_and_start_at_least_one_replica(limits):
    options = replica_options.replica_options(ServeConfig(**limits), {}, {})
    serve.deployment(type("D", (), {}), **options)  # raises for an option that Serve does not know
    scaling = AutoscalingConfig(**options["autoscaling_config"])
    assert scaling.initial_replicas == max(1, limits.get("min_replicas", 1))
    assert scaling.min_replicas == limits.get("min_replicas", 1)
    assert 0 < scaling.target_ongoing_requests < ServeConfig().max_ongoing_requests


def test_surge_replicas_only_where_resources_suffice_for_both_versions():
    limits = ServeConfig(max_replicas=2)
    for has, surge in (({"CPU": 2}, 0), ({"CPU": 3}, 100), ({"CPU": 64, "GPU": 2}, 0), ({"CPU": 64, "GPU": 3}, 100)):
        options = replica_options.replica_options(limits, has, {})
        assert options["max_surge_percent"] == surge
        assert options["ray_actor_options"]["num_gpus"] == int("GPU" in has)


def test_merged_version_is_fixed_at_deployment(config, store):
    """So that all replicas have the same one, also those that come later."""
    made = deployment.build_application(config.replace(**{"serve.merge": "colours"}))
    [inner] = made._bound_deployment.init_args[0]._bound_deployment.init_args
    assert inner.serve.merge == "colours@v0002"
    write_atomic(
        store / "colours" / "aliases.json",
        '{"prod": {"version": "v0001", "canary": "v0002", "percent": 99.9, "before": []}}',
    )
    handle = Handle(START)
    for model in ("colours", f"{Path(config.model.base).name}:colours", "colours@v0001"):
        complete(inner, handle, CompletionRequest(model, "q", sticky_key="t"))
    assert handle.held == ["colours@v0002", "colours@v0002", "colours@v0001"]
    made = deployment.build_application(config.replace(**{"serve.merge": "colours"}))
    assert made._bound_deployment.init_args[0]._bound_deployment.init_args[0].serve.merge == "colours@v0001"
    (store / "colours" / "aliases.json").unlink()
    assert asyncio.run(ingress(inner, handle).models()) == ["colours"]
    with pytest.raises(AdapterError, match="no adapter 'cold'"):
        deployment.build_application(config.replace(**{"serve.merge": "cold"}))


def test_api_replicas_sets_the_ingress_replicas(config):
    assert deployment.build_application(config.replace(**{"serve.api_replicas": 3}))._bound_deployment.num_replicas == 3


def test_serve_resources_become_actor_options(config):
    made = deployment.build_application(config.replace(**{"cluster.serve_resources": {"CPU": 3, "server": 1}}))
    model = made._bound_deployment.init_args[0]._bound_deployment
    assert model.ray_actor_options["num_cpus"] == 3 and model.ray_actor_options["resources"] == {"server": 1}


@pytest.mark.parametrize("keys, gpus", [
    ({}, 0), ({"train.gpu": True}, 1), ({"cluster.serve_resources": {"GPU": 1}}, 1),
    ({"train.gpu": True, "cluster.serve_resources": {"GPU": 0}}, 0),
])  # fmt: skip
def test_a_replica_asks_for_the_gpu_of_a_node_that_is_still_to_come(config, keys, gpus):
    made = deployment.build_application(config.replace(**keys))
    model = made._bound_deployment.init_args[0]._bound_deployment
    assert model.ray_actor_options.get("num_gpus", 0) == gpus
    assert model._deployment_config.max_surge_percent == 0
    if gpus:
        with pytest.raises(ConfigError, match="takes 2 GPUs"):
            deployment.build_application(config.replace(**keys, **{"cluster.gpus_per_replica": 2}))


def test_the_prefix_router_is_the_models_alone_and_only_where_asked_for(config, monkeypatch):
    def routers(config):
        api = deployment.build_application(config)._bound_deployment
        model = api.init_args[0]._bound_deployment
        return [d._deployment_config.request_router_config for d in (api, model)]

    usual, chosen = routers(config), routers(config.replace(**{"serve.router": "prefix"}))
    assert usual[0] == usual[1] == chosen[0]
    assert chosen[1].request_router_class.endswith("PrefixRouter")
    assert chosen[1].request_router_kwargs["imbalanced_threshold"] == config.serve.max_ongoing_requests // 2
    monkeypatch.setitem(sys.modules, "pi_ray.serve.engine.prefix_router", None)
    with pytest.raises(ConfigError, match=r"serve\.router prefix: not with this version of Ray"):
        deployment.build_application(config.replace(**{"serve.router": "prefix"}))


def test_requests_are_routed_by_what_can_share_a_cached_prefix():
    from pi_ray.serve.engine.prefix_router import routed_text

    one, other = (CompletionRequest("m", query, history=(("system", "the rules"),)) for query in ("blue?", "grey?"))
    head = routed_text(one).removesuffix("blue?")
    assert head.endswith("the rules\n\n") and routed_text(other) == f"{head}grey?"
    for change in ({"model": "n"}, {"cache_salt": "of another key"}):
        assert not routed_text(replace(one, **change)).startswith("m\0\0")
    ids = [routed_text(SimpleNamespace(model="m", cache_salt=None, prompt=prompt)) for prompt in ([5, 0xD800], [5])]
    assert ids == ["m\0\0\x05\ud800", "m\0\0\x05"]
    assert routed_text(CompletionRequest("m", "")), "Ray's router divides by its length"
