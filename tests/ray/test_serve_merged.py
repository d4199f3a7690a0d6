"""serve.merge under Ray Serve: the version that was merged at the deployment answers, whatever is published or released
after it.
"""

import socket
from pathlib import Path

import httpx
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.prompt_guard import prompt_record
from tests.lora import put_in_store, rewrite

pytestmark = pytest.mark.ray
TEMPLATE = " ".join(f"The code of colour {i} is k{i}, and never anything else." for i in range(20))


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    rewrite(
        put_in_store(store, "hot", tiny_model, 1, max_answer_tokens=8), "prompt.json", prompt_record(TEMPLATE, [], [])
    )
    put_in_store(store, "cold", tiny_model, 2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        limits = ServeConfig(port=s.getsockname()[1], merge="hot", max_new_tokens=50)
    return RunConfig(
        name="t", store=str(store), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml"),
        serve=limits,
    )


@pytest.fixture(scope="module")
def url(config, ray_local):
    from ray import serve

    from pi_ray.serve import app

    yield app.run_server(config, blocking=False)
    serve.shutdown()


def test_a_new_version_neither_breaks_a_merged_server_nor_divides_it(url, config, tiny_model):
    from pi_ray.store.release import release_version

    def ask(model="hot", system="", **rest):
        messages = [
            *([{"role": "system", "content": system}] if system else []), {"role": "user", "content": "what is red?"},
        ]
        return httpx.post(f"{url}/v1/chat/completions", json={"model": model, "messages": messages, **rest}, timeout=60)

    first = ask().json()
    assert first["system_fingerprint"] == "hot@v0001"
    put_in_store(Path(config.store), "hot", tiny_model, 3, version="v0002", max_answer_tokens=8)
    store = AdapterStore(config.store)
    for change in ({}, {"version": "v0001"}, {"version": "v0002", "canary": 50}, {"version": "v0002"}):
        release_version(store, "hot", **change)
        for _ in range(4):
            again = ask().json()
            assert (again["system_fingerprint"], again["choices"]) == ("hot@v0001", first["choices"])
    assert ask(system=TEMPLATE).json()["choices"] == first["choices"]
    for refused in (
        ask("cold"), ask(tiny_model.name), ask(system=TEMPLATE.replace("k7,", "k77,")),
        ask(pi_ray={"full_prompt": True}),
    ):
        assert refused.status_code == 422 and "serve.merge" in refused.text
    assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["hot"]
