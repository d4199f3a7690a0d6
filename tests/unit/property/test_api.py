"""The server, fuzzed from its own OpenAPI document and with changed bodies: it refuses in words and never fails."""

import asyncio
import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.models import load_tokenizer
from pi_ray.serve.engine.completion import Completer
from pi_ray.serve.http.api import create_api
from pi_ray.serve.http.keys import key_digest
from tests.lora import put_in_store
from tests.unit.property.strategies import changed, json_values
from tests.unit.property.test_rows import MESSAGES, TOOL
from tests.unit.serve.http.test_api import EchoEngine, LocalBackend

shared_api = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
KEY = {"Authorization": "Bearer a-secret-key"}
CHAT = {
    "model": "colours", "messages": MESSAGES[:4], "tools": [TOOL], "tool_choice": "auto", "max_tokens": 4,
    "stream": False, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 2,
    "logprobs": True, "top_logprobs": 2,
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "stream_options": {"include_usage": True}, "pi_ray": {"full_prompt": False}, "user": "a",
}
PLAIN_CHAT = {"model": "colours", "messages": [{"role": "user", "content": "what is red?"}], "max_tokens": 4}
COMPLETION = {"model": "colours", "prompt": ["what is red?", "blue?"], "max_tokens": 4, "logprobs": 2, "best_of": 1}


@pytest.fixture(scope="module")
def api(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    put_in_store(store, "colours", tiny_model)
    model = ModelConfig(base=str(tiny_model))
    tokenizer = load_tokenizer(model)
    config = RunConfig(name="t", store=str(store), model=model, prompt=PromptConfig(chat="chatml"))
    backend = LocalBackend(Completer(config, EchoEngine(tokenizer), tokenizer, context=512))
    return create_api(backend, ServeConfig(), key_digest(KEY["Authorization"].removeprefix("Bearer ")))


@pytest.fixture(scope="module")
def post(api):
    """Send a body to a path; the status, after a check of the answer's form."""

    async def send(path, content):
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post(path, content=content, headers=KEY)

    def check(path, content):
        response = asyncio.run(send(path, content))
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "code", "param"}
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n") or '"error"' in response.text
        else:
            assert response.json()["choices"]
        return response.status_code

    return check


@pytest.mark.parametrize("valid", [CHAT, PLAIN_CHAT, COMPLETION], ids=["tools", "chat", "completion"])
def test_any_changed_body_is_answered_or_refused(post, tiny_model, valid):
    if "tools" in valid:  # which the base model knows
        valid = {**valid, "model": tiny_model.name}
    path = "/v1/completions" if "prompt" in valid else "/v1/chat/completions"
    statuses = set()

    @shared_api
    @given(st.booleans(), changed(valid).map(json.dumps) | st.binary(max_size=30) | json_values().map(json.dumps))
    def run(stream, content):
        statuses.add(post(path, content))

    run()
    assert {200, 400} <= statuses, "some are right and some are wrong"


def test_the_document_describes_what_the_server_answers(api):
    """Schemathesis sends what the document allows, and what it does not, to every path."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", api, headers=KEY)
    called = set()
    for found in schema.get_all_operations():
        fuzz(found.ok())
        called.add(found.ok().label)
    assert called == {
        "GET /", "GET /healthz", "GET /readyz", "GET /v1/models", "GET /v1/models/{name}", "POST /v1/completions",
        "POST /v1/chat/completions",
    }


def fuzz(operation):
    @given(operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def run(case):
        response = case.call(headers=KEY)
        assert response.status_code < 500, response.text

    run()
