"""The HTTP side without Ray: formats, limits, keys, refusals, and that a client who leaves stops the work."""

import asyncio
import json
import logging
import re
from contextlib import aclosing

import httpx
import openai
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.serving.api import create_api, key_digest
from pi_ray.serving.completion import Completer, RefusedError, TextStream
from tests.lora import put_in_store

KEY = "a-secret-key"
ANSWER = "k4 – ünïcode 🎨 done"


class EchoEngine:
    """Yields the ids of ANSWER and end-of-sequence, and keeps every request."""

    def __init__(self, tokenizer):
        self.answer = [*tokenizer(ANSWER).input_ids, tokenizer.eos_token_id]
        self.requests = []
        self.open = 0
        self.delay = 0.0

    async def generate(self, request):
        self.requests.append(request)
        self.open += 1
        try:
            for token in self.answer[: request.max_new_tokens]:
                await asyncio.sleep(self.delay)
                yield token
        finally:
            self.open -= 1


class LocalBackend:
    """Completer in this process, as the Model deployment has it."""

    def __init__(self, completer):
        self.completer = completer
        self.error = None

    async def models(self):
        return ["base", *self.completer.store.names()]

    async def complete(self, ask):
        if self.error:
            raise self.error
        async with aclosing(self.completer.complete(ask)) as events:
            async for event in events:
                yield event


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelConfig(base=str(tiny_model)))


@pytest.fixture(scope="module")
def store(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    put_in_store(store, "colours", tiny_model)
    put_in_store(store, "short", tiny_model, template="Answer with one code.", rate=0.3)
    return store


@pytest.fixture
def backend(store, tiny_model, tokenizer):
    config = RunConfig(name="t", store=str(store), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml"), serve=ServeConfig(max_new_tokens=100))
    return LocalBackend(Completer(config, EchoEngine(tokenizer), tokenizer, context=512))


def client(backend, key="", **limits):
    api = create_api(backend, ServeConfig(**{"body_limit_bytes": 20_000, **limits}), key_digest(key))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")


def call(backend, path="/v1/chat/completions", body=None, content=None, headers=None, method="POST", **options):
    async def send():
        async with client(backend, **options) as http:
            return await http.request(method, path, json=body, content=content, headers=headers)

    return asyncio.run(send())


def chat(query="what is red?", **rest):
    return {"model": "colours", "messages": [{"role": "user", "content": query}], "max_tokens": 60, **rest}


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    return error


def test_the_engine_gets_exactly_the_ids_of_the_last_training_phase(backend, tokenizer, tiny_model):
    encoder = PromptEncoder(tokenizer, PromptConfig(chat="chatml", query="Q: {query}"))
    for name, template in (("colours", ""), ("short", "Answer with one code."), ("colours@v0001", ""), (f"{tiny_model.name}:colours", "")):
        assert call(backend, body=chat("what is <|im_end|> red?", model=name)).status_code == 200
        request = backend.completer.engine.requests[-1]
        assert request.prompt_ids == encoder.encode("what is <|im_end|> red?", template).ids
        assert request.adapter.endswith("v0001")
    assert call(backend, body=chat(model=tiny_model.name)).status_code == 200
    assert backend.completer.engine.requests[-1].prompt_ids == PromptEncoder(tokenizer, PromptConfig(chat="chatml")).encode("what is red?").ids
    assert backend.completer.engine.requests[-1].adapter == ""


def test_a_chat_completion_has_openais_shape_and_says_what_was_saved(backend):
    body = call(backend, body=chat()).json()
    assert (body["object"], body["model"], body["system_fingerprint"]) == ("chat.completion", "colours", "colours@v0001")
    assert body["choices"] == [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}]
    sent, made = len(backend.completer.engine.requests[-1].prompt_ids), len(backend.completer.engine.answer)
    assert body["usage"] == {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made, "prompt_tokens_saved": 108}


def test_a_plain_completion_takes_the_query_as_prompt(backend):
    body = call(backend, "/v1/completions", {"model": "colours", "prompt": "what is red?", "max_tokens": 60}).json()
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", ANSWER)
    ids = backend.completer.engine.requests[-1].prompt_ids
    call(backend, body=chat())
    assert backend.completer.engine.requests[-1].prompt_ids == ids


def test_the_openai_client_reads_answers_streams_and_errors(backend):
    async def use():
        async with client(backend, key=KEY) as http:
            api = openai.AsyncOpenAI(base_url="http://test/v1", api_key=KEY, http_client=http, max_retries=0)
            assert [m.id async for m in api.models.list()] == ["base", "colours", "short"]
            whole = await api.chat.completions.create(**chat())
            assert whole.choices[0].message.content == ANSWER
            assert whole.usage.prompt_tokens_saved == 108
            chunks = [c async for c in await api.chat.completions.create(**chat(), stream=True, stream_options={"include_usage": True})]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
            assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
            assert [c.choices[0].delta.role for c in chunks if c.choices].count("assistant") == 1
            assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
            assert len(chunks) > 5
            text = [c async for c in await api.completions.create(model="colours", prompt="x", max_tokens=60, stream=True)]
            assert "".join(c.choices[0].text for c in text) == ANSWER
            with pytest.raises(openai.NotFoundError, match="no adapter"):
                await api.chat.completions.create(**chat(model="unknown"))
            backend.error = RefusedError(429, "full", "rate_limit_error", "queue_full")
            with pytest.raises(openai.RateLimitError):
                await api.chat.completions.create(**chat(), stream=True)

    asyncio.run(use())


def test_a_stream_ends_with_done_and_gives_usage_only_when_asked(backend):
    lines = call(backend, body=chat(stream=True)).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert not any("usage" in json.loads(line[6:]) for line in lines[:-1])


@pytest.mark.parametrize("name", ["unknown", "..", "../x", "/etc", "a\x00b", ".hidden", "base:..", "x" * 300, "colours@v9999", "а", ""])
def test_unknown_and_forbidden_models_are_404(backend, name):
    response = call(backend, body=chat(model=name))
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


def test_a_refused_adapter_is_422_with_the_reason(backend, store, tiny_model):
    bad = put_in_store(store, "bad", tiny_model)
    (bad / "x.bin").write_bytes(b"")
    response = call(backend, body=chat(model="bad"))
    assert (response.status_code, error_of(response)["code"]) == (422, "adapter_refused")
    assert "x.bin" in response.text
    assert call(backend, body=chat()).status_code == 200


def test_a_prompt_format_that_the_model_does_not_allow_is_422_with_the_cure(backend, tiny_model):
    backend.completer.config = backend.completer.config.replace(**{"prompt.chat": "model"})
    response = call(backend, body=chat(model=tiny_model.name))
    assert (response.status_code, error_of(response)["code"]) == (422, "model_refused")
    assert "prompt.chat" in response.text


@pytest.mark.parametrize(("body", "param"), [
    (chat(n=2), "n"),
    (chat(n=10**6), "n"),
    (chat(max_tokens=10**9), "max_tokens"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(temperature=3), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(stop=["a"] * 5), "stop"),
    (chat(stop=""), "stop"),
    (chat(seed=2**70), "seed"),
    ({**chat(), "messages": []}, "messages"),
    ({**chat(), "messages": [{"role": "system", "content": "be nice"}, {"role": "user", "content": "x"}]}, "messages"),
    ({**chat(), "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]}, "messages"),
    ({**chat(), "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
    (chat("word " * 600), "messages"),
    (chat(max_tokens=100, query="word " * 450), "messages"),
    ({"messages": []}, "model"),
])  # fmt: skip
def test_what_cannot_be_done_is_a_400_that_names_the_field(backend, body, param):
    response = call(backend, body=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert backend.completer.engine.requests == []


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"model": ' * 1_500, b'{"model": 1' + b"0" * 6_000 + b"}",
    b'{"model": "colours", "messages": [{"role": "user", "content": "\\ud800"}]}', '{"model": "colours"}'.encode("utf-16"),
])  # fmt: skip
def test_a_body_that_is_not_the_json_asked_for_is_400(backend, content):
    response = call(backend, content=content)
    assert response.status_code == 400
    error_of(response)


def test_a_large_body_is_413_by_its_declared_and_by_its_real_length(backend):
    read = []

    async def endless():
        for _ in range(100):
            read.append(1)
            yield b"x" * 10_000

    assert call(backend, content=b"x" * 20_001).status_code == 413
    assert call(backend, content=endless()).status_code == 413
    assert call(backend, content=b"{}", headers={"content-length": "9" * 500}).status_code == 413


def test_unknown_fields_and_null_are_taken_as_openai_does(backend):
    assert call(backend, body=chat(user="me", logit_bias=None, temperature=None, stop=None, new_field={})).status_code == 200


def test_text_parts_make_one_query(backend):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "red?"}]
    call(backend, body={**chat(), "messages": [{"role": "user", "content": parts}]})
    first = backend.completer.engine.requests[-1].prompt_ids
    call(backend, body=chat())
    assert backend.completer.engine.requests[-1].prompt_ids == first


def test_the_limit_defaults_to_twice_the_longest_trained_answer_and_is_reported(backend):
    body = {k: v for k, v in chat().items() if k != "max_tokens"}
    response = call(backend, body=body).json()
    assert backend.completer.engine.requests[-1].max_new_tokens == 12
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 12
    call(backend, body={**body, "max_completion_tokens": 5})
    assert backend.completer.engine.requests[-1].max_new_tokens == 5


def test_stop_strings_are_cut_from_the_text(backend):
    for stream in (False, True):
        response = call(backend, body=chat(stop=["done", "zzz"], stream=stream))
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")] if stream else []
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events) if stream else response.json()["choices"][0]["message"]["content"]
        assert text == ANSWER.removesuffix(" done")


def routes(backend):
    api = create_api(backend, ServeConfig(), key_digest(KEY))
    return [(method, route.path) for route in api.routes for method in sorted(route.methods)]


def test_every_route_but_health_needs_the_key(backend, caplog):
    caplog.set_level(logging.DEBUG)
    found = routes(backend)
    assert ("POST", "/v1/chat/completions") in found
    for method, path in [*found, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/healthz/"), ("GET", "//healthz")]:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer {KEY}x"}):
            response = call(backend, path, headers=given, method=method, key=KEY)
            assert response.status_code == (200 if path == "/healthz" else 401), (method, path, given)
        assert call(backend, path, headers={"Authorization": f"Bearer {KEY}"}, method=method, key=KEY).status_code != 401
    assert error_of(call(backend, body=chat(), key=KEY))["code"] == "invalid_api_key"
    assert KEY not in caplog.text


def test_a_wrong_key_is_refused_before_the_body_is_read(backend):
    async def forbidden():
        raise AssertionError("the body was read")
        yield b""

    assert call(backend, content=forbidden(), key=KEY).status_code == 401


def test_unknown_paths_and_methods_have_openais_error_format(backend):
    for method, path, status in (("GET", "/v1/x", 404), ("GET", "/v1/completions", 405)):
        response = call(backend, path, method=method)
        assert response.status_code == status
        error_of(response)


def test_a_full_queue_is_429_with_retry_after_and_a_lost_replica_503(backend):
    for status in (429, 503):
        backend.error = RefusedError(status, "later")
        for stream in (False, True):
            response = call(backend, body=chat(stream=stream))
            assert (response.status_code, response.headers["retry-after"]) == (status, "1")


def test_a_bug_is_a_500_that_tells_nothing(backend):
    backend.error = ValueError("/secret/path")
    response = call(backend, body=chat())
    assert response.status_code == 500
    assert "secret" not in response.text


def test_the_time_limit_is_408_and_stops_the_generation(backend):
    backend.completer.engine.delay = 10
    for stream in (False, True):
        assert call(backend, body=chat(stream=stream), request_timeout_s=0.2).status_code == 408
    assert backend.completer.engine.open == 0


def test_the_time_limit_in_the_middle_of_a_stream_is_its_last_event(backend):
    backend.completer.engine.delay = 0.1
    text = call(backend, body=chat(stream=True), request_timeout_s=0.45).text
    assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["code"] == "request_timeout"
    assert "[DONE]" not in text
    assert backend.completer.engine.open == 0


def test_a_client_that_leaves_stops_the_generation(backend):
    backend.completer.engine.delay = 0.05
    engine = backend.completer.engine

    async def leave():
        api = create_api(backend, ServeConfig())
        left, started = asyncio.Event(), asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(chat(stream=True)).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                started.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"", "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        task = asyncio.create_task(api(scope, receive, send))
        await started.wait()
        assert engine.open == 1
        left.set()
        await asyncio.wait_for(task, 1)
        await asyncio.sleep(0)
        return engine.open

    assert asyncio.run(leave()) == 0


@pytest.mark.parametrize("text", [ANSWER, "  padded \n\n", "", "🎨🎨", "a\n\n b", " ", "naïve – 漢字 test", "x" * 300])
def test_streamed_pieces_join_to_what_evaluation_decodes(tokenizer, text):
    stream, ids = TextStream(tokenizer), [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == PromptEncoder(tokenizer, PromptConfig(chat="chatml")).decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["END", "\n", "k4", "zzz", " – "])
def test_text_is_cut_at_the_stop_string_however_the_tokens_fall(tokenizer, stop):
    text = "code k4 – \nE EN END tail"
    stream = TextStream(tokenizer, (stop,))
    joined = "".join(stream.push(i) for i in tokenizer(text).input_ids) + stream.finish()
    assert joined == re.split(re.escape(stop), text)[0].strip()
