"""Ray Serve for real, started once: two replicas of a tiny random model with two adapters, called with the openai
client.

With vLLM all of it runs once more with that engine; elsewhere the skip says what is missing.
"""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pi_ray.cluster.session import SERVE
from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.registry import engines
from pi_ray.train.generation import generate_greedy
from tests.conftest import tiny
from tests.lora import put_in_store

pytestmark = pytest.mark.ray
REPO = Path(__file__).parents[2]
KEY = "key-of-the-test"
QUERY = "what is red?"
REPLICAS, SLOTS, QUEUE = 2, 2, 2
ONCE = ("east", "north", "south", "west")  # adapters that one test alone asks for


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """That of all tests, but with heads of a width that vLLM has attention for on CPUs."""
    return tiny(tmp_path_factory.mktemp("tiny-llama"), "Llama", head_dim=32)


@pytest.fixture(scope="module", params=engines.names())
def config(request, tiny_model, tmp_path_factory):
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("serve.engine vllm was not tried: make test-vllm does, with vLLM's build for CPUs")
    store = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(("colours", "shapes", *ONCE)):
        put_in_store(store, name, tiny_model, seed, max_answer_tokens=8)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    limits = ServeConfig(
        port=port, engine=request.param, min_replicas=REPLICAS, max_replicas=REPLICAS, max_ongoing_requests=SLOTS,
        max_queued_requests=QUEUE,
        max_new_tokens=2000, request_timeout_s=60, api_key_env="PI_RAY_TEST_KEY",
    )  # fmt: skip
    return RunConfig(
        name="t", store=str(store), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml"),
        serve=limits,
    )


@pytest.fixture(scope="module")
def url(config, ray_local):
    from ray import serve

    from pi_ray.serve import app

    os.environ["PI_RAY_TEST_KEY"] = KEY
    yield app.run_server(config, blocking=False)
    del os.environ["PI_RAY_TEST_KEY"]
    serve.shutdown()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def ask(client, model="colours", **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUERY}], **options)


def free(client):
    """Seconds until a slot answers again."""
    start = time.time()
    while time.time() - start < 60:
        try:
            ask(client, max_tokens=1)
            return time.time() - start
        except openai.RateLimitError:
            time.sleep(0.05)
    raise AssertionError("the slots did not come back")


def test_the_openai_client_gets_each_adapters_answer_whole_and_streamed(client, tiny_model):
    assert [m.id for m in client.models.list()] == [tiny_model.name, "colours", *ONCE[:2], "shapes", *ONCE[2:]]
    answers = {}
    for name in ("colours", "shapes", tiny_model.name):
        whole = ask(client, name, max_tokens=12)
        chunks = list(ask(client, name, max_tokens=12, stream=True, stream_options={"include_usage": True}))
        answers[name] = whole.choices[0].message.content
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answers[name]
        assert chunks[-1].usage == whole.usage
    assert len(set(answers.values())) == 3


def test_the_prompt_has_exactly_the_tokens_that_training_used(client, tiny_model):
    encoder = PromptEncoder(
        load_tokenizer(ModelConfig(base=str(tiny_model))), PromptConfig(chat="chatml", query="Q: {query}")
    )
    usage = ask(client, max_tokens=2).usage
    assert usage.prompt_tokens == len(encoder.encode(QUERY))
    assert usage.prompt_tokens_saved == 108


def test_answers_are_those_of_transformers_with_the_same_adapter(client, config, tiny_model):
    encoder = PromptEncoder(load_tokenizer(config.model), PromptConfig(chat="chatml", query="Q: {query}"))
    for name in ("colours", "shapes"):
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, Path(config.store) / name / "v0001").eval()
        [expected] = generate_greedy(model, [], [encoder.encode(QUERY)], 6, encoder.tokenizer.eos_token_id)
        assert ask(client, name, max_tokens=6).choices[0].message.content == encoder.decode(expected)


def test_calls_that_are_required_and_answers_in_a_schema_come_through_the_whole_server(client, tiny_model):
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
            "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "parameters": city, "strict": True}}
    body = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    [choice] = ask(client, tiny_model.name, **body).choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    chunks = [chunk.choices[0] for chunk in ask(client, tiny_model.name, stream=True, **body)]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": city, "strict": True}}
    answers = [ask(client, name, response_format=schema, max_tokens=200) for name in ("colours", "shapes")]
    assert all(json.loads(each.choices[0].message.content)["city"] in ("Oslo", "Rome") for each in answers)
    refused = {**schema, "json_schema": {"name": "place", "schema": {"not": {}}, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="not"):
        ask(client, response_format=refused)


@pytest.mark.parametrize(
    "example", [["sh", "serve/curl.sh"], [sys.executable, "serve/client.py"]], ids=["curl", "openai"]
)
def test_the_examples_for_clients_work_as_they_are(client, url, example):
    def run(key):
        return subprocess.run(
            [*example, "colours", QUERY, url], cwd=REPO, env={**os.environ, "PI_RAY_API_KEY": key}, capture_output=True,
            text=True, timeout=60,
        )

    expected, found = ask(client).choices[0].message.content, run(KEY)
    assert found.returncode == 0, found.stderr
    assert (
        json.loads(found.stdout)["choices"][0]["message"]["content"] if example[0] == "sh" else found.stdout.strip()
    ) == expected
    assert example[0] == "sh" or "108 not sent" in found.stderr
    assert run("wrong").returncode != 0


def test_unknown_models_and_wrong_keys_are_refused(client, url):
    for name in ("unknown", "../colours"):
        with pytest.raises(openai.NotFoundError):
            ask(client, name)
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"))
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz", timeout=60).json() == {"status": "ready"}


def test_a_burst_is_answered_or_told_to_come_back(client):
    statuses = []

    def one():
        try:
            ask(client, max_tokens=200)
            statuses.append(200)
        except openai.RateLimitError as error:
            statuses.append(error.status_code)
            assert error.response.headers["retry-after"] == "1"

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and len(statuses) == len(threads)
    assert statuses.count(200) >= REPLICAS * SLOTS
    free(client)


def test_clients_that_leave_free_their_slots(client):
    """Long before their 2,000 tokens are done: in less than half of the time that these would take, by the time that
    200 take.
    """
    start = time.time()
    ask(client, max_tokens=200)
    tenth = time.time() - start
    streams = [ask(client, max_tokens=2000, stream=True) for _ in range(REPLICAS * SLOTS)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    assert free(client) < 5 * tenth


def exported(ray_local):
    """Every sample that Ray's agent shows to Prometheus: name -> [(tags, value)]."""
    [node] = ray_local.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
    found = {}
    for name, tags, value in re.findall(r"^(ray_\w+)\{(.*?)\} (\S+)$", text, re.M):
        found.setdefault(name, []).append((dict(re.findall(r'(\w+)="(.*?)"', tags)), float(value)))
    return found


def seen(ray_local, enough):
    """What is exported as soon as it is `enough`: Ray's agents report every ten seconds."""
    start = time.time()
    while not enough(found := exported(ray_local)):
        assert time.time() - start < 90, sorted(found)
        time.sleep(2)
    return found


def test_an_adapter_stays_with_the_replica_that_loaded_it(client, ray_local):
    def ask_each():
        for name in ONCE:
            ask(client, name, max_tokens=1)

    def held(found):
        """adapter -> replicas that told Serve that they have it"""
        told = [
            (tags["model_id"], tags["replica"])
            for tags, value in found.get("ray_serve_registered_multiplexed_model_id", [])
            if value
        ]
        return {name: {replica for model, replica in told if model == f"{name}@v0001"} for name in ONCE}

    def asked(found):
        return sum(value for _, value in found["ray_serve_multiplexed_get_model_requests_counter_total"])

    ask_each()
    found = seen(ray_local, lambda found: all(held(found).values()))  # by now the router knows it too
    first, before = held(found), asked(found)
    for _ in range(5):
        ask_each()
    found = seen(ray_local, lambda found: asked(found) >= before + 5 * len(ONCE))
    assert held(found) == first and [len(replicas) for replicas in first.values()] == [1] * len(ONCE)


def test_serves_processes_have_its_faster_settings(url, ray_local):
    def in_a_worker():
        from ray.serve._private import constants

        return {name: getattr(constants, name) for name in SERVE}

    assert ray_local.get(ray_local.remote(num_cpus=0)(in_a_worker).remote()) == {
        name: {"1": True, "0": False}.get(value, value) for name, value in SERVE.items()
    }


@pytest.mark.fault
def test_a_request_whose_headers_do_not_end_loses_its_connection(url, config):
    with socket.create_connection(("127.0.0.1", config.serve.port), timeout=60) as half:
        half.sendall(b"GET /v1/models HTTP/1.1\r\nHost: loc")
        with suppress(ConnectionResetError):
            assert half.recv(1) == b""


def test_prometheus_sees_requests_tokens_and_money(client, config, ray_local):
    ask(client, max_tokens=1)
    wanted = {
        f"ray_pi_ray_{name}"
        for name in (
            "requests_total", "latency_seconds_count", "ttft_seconds_bucket", "open_requests",
            *(("adapter_hits_total", "adapters") if config.serve.engine == "transformers" else ()),  # its own figures
        )
    }
    found = seen(ray_local, wanted.issubset)
    answered = {
        (tags["model"], tags["version"]) for tags, _ in found["ray_pi_ray_requests_total"] if tags["status"] == "200"
    }
    assert {("colours", "v0001"), ("shapes", "v0001")} <= answered
    assert {"429", "404", "401"} <= {tags["status"] for tags, _ in found["ray_pi_ray_requests_total"]}
    money, tokens = (sum(value for _, value in found[f"ray_pi_ray_saved_{what}_total"]) for what in ("money", "tokens"))
    assert tokens >= 108 and money == pytest.approx(tokens * config.cost.input / 1e6)
    assert (
        httpx.get(
            f"http://127.0.0.1:{config.serve.port}/metrics", headers={"Authorization": f"Bearer {KEY}"}
        ).status_code
        == 404
    )


def test_new_versions_and_releases_reach_the_running_replicas(client, config, tiny_model):
    from pi_ray.store.adapters import AdapterStore
    from pi_ray.store.release import release_version

    def answered():
        return {ask(client, "flags", max_tokens=1).system_fingerprint for _ in range(24)}

    for seed, version in ((8, "v0001"), (9, "v0002")):
        put_in_store(Path(config.store), "flags", tiny_model, seed, version=version, max_answer_tokens=8)
        assert answered() == {f"flags@{version}"}
    store = AdapterStore(config.store)
    for change, versions in (
        ({"version": "v0001"}, {"v0001"}), ({"version": "v0002", "canary": 50}, {"v0001", "v0002"}),
        ({"rollback": True}, {"v0001"}),
    ):
        release_version(store, "flags", **change)
        assert answered() == {f"flags@{version}" for version in versions}
    choices = ask(client, "flags", n=2, temperature=1, seed=1, logprobs=True, top_logprobs=1, max_tokens=4).choices
    assert choices[0].message.content != choices[1].message.content
    assert all(len(choice.logprobs.content) == 4 for choice in choices)
