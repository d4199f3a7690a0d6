"""Ray Serve for real, started once: a tiny random model with two adapters, called with the openai client."""

import os
import socket
import threading
import time

import httpx
import openai
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from tests.lora import put_in_store

pytestmark = pytest.mark.ray
KEY = "key-of-the-test"
QUERY = "what is red?"


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(("colours", "shapes")):
        put_in_store(store, name, tiny_model, seed, max_answer_tokens=8)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    limits = ServeConfig(port=port, max_ongoing_requests=2, max_queued_requests=2, max_new_tokens=2000, request_timeout_s=60, api_key_env="PI_RAY_TEST_KEY")
    return RunConfig(name="t", store=str(store), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml"), serve=limits)


@pytest.fixture(scope="module")
def url(config, ray_local):
    from ray import serve

    from pi_ray.serving import app

    os.environ["PI_RAY_TEST_KEY"] = KEY
    yield app.run(config, blocking=False)
    del os.environ["PI_RAY_TEST_KEY"]
    serve.shutdown()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def ask(client, model="colours", **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUERY}], **options)


def free(client):
    """Seconds until both slots of the engine answer again."""
    start = time.time()
    while time.time() - start < 60:
        try:
            ask(client, max_tokens=1)
            return time.time() - start
        except openai.RateLimitError:
            time.sleep(0.05)
    raise AssertionError("the slots did not come back")


def test_the_openai_client_gets_each_adapters_answer_whole_and_streamed(client, tiny_model):
    assert [m.id for m in client.models.list()] == [tiny_model.name, "colours", "shapes"]
    answers = {}
    for name in ("colours", "shapes", tiny_model.name):
        whole = ask(client, name, max_tokens=12)
        chunks = list(ask(client, name, max_tokens=12, stream=True, stream_options={"include_usage": True}))
        answers[name] = whole.choices[0].message.content
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answers[name]
        assert chunks[-1].usage == whole.usage
    assert len(set(answers.values())) == 3


def test_the_prompt_has_exactly_the_tokens_that_training_used(client, tiny_model):
    encoder = PromptEncoder(load_tokenizer(ModelConfig(base=str(tiny_model))), PromptConfig(chat="chatml", query="Q: {query}"))
    usage = ask(client, max_tokens=2).usage
    assert usage.prompt_tokens == len(encoder.encode(QUERY).ids)
    assert usage.prompt_tokens_saved == 108


def test_unknown_models_and_wrong_keys_are_refused(client, url):
    for name in ("unknown", "../colours"):
        with pytest.raises(openai.NotFoundError):
            ask(client, name)
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"))
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_a_burst_is_answered_or_told_to_come_back(client):
    seen = []

    def one():
        try:
            ask(client, max_tokens=200)
            seen.append(200)
        except openai.RateLimitError as error:
            seen.append(error.status_code)
            assert error.response.headers["retry-after"] == "1"

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {200, 429}
    assert seen.count(200) >= 2
    free(client)


def test_clients_that_leave_free_their_slots(client):
    """Long before their 2,000 tokens are done: in less than half of the time that these would take, by the time that 200 take."""
    start = time.time()
    ask(client, max_tokens=200)
    tenth = time.time() - start
    streams = [ask(client, max_tokens=2000, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    assert free(client) < 5 * tenth
