"""The HTTP side without Ray: formats, limits, keys, refusals, and that a client who leaves stops the work (fault tests
S5 and S6).
"""

import asyncio
import json
import logging
import re
import shutil
import threading
import time
from contextlib import aclosing

import httpx
import openai
import pytest
from pydantic import ValidationError

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.errors import AdapterError, ConfigError, CorruptArtifactError, ModelError, StorageError
from pi_ray.models import base_name, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Token
from pi_ray.serve.engine import completion
from pi_ray.serve.engine.completion import Completer, served_models
from pi_ray.serve.engine.detokenizer import IncrementalDetokenizer, token_text
from pi_ray.serve.engine.prompt_reader import COUNT_CHUNK_CHARS
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.serve.engine.request import CompletionRequest
from pi_ray.serve.http.api import PUBLIC_PATHS, create_api
from pi_ray.serve.http.keys import key_digest, keys_file_line
from pi_ray.serve.http.schemas import MAX_CHOICES, ChatBody
from pi_ray.store.adapters import StoreUnavailableError
from pi_ray.store.prompt_guard import prompt_record
from tests.lora import put_in_store, rewrite

KEY = "a-secret-key"
ANSWER = "k4 – ünïcode 🎨 done"
TEMPLATE = "Answer with one code. " + " ".join(
    f"The code of colour {i} is k{i}, and never anything else." for i in range(20)
)
COMPRESSED = " ".join(f"code colour {i} is k{i}," for i in range(20))


class EchoEngine:
    """Yields the ids of ANSWER and end-of-sequence, and keeps every request. With a temperature the answer is the
    seed.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.answer = [*tokenizer(ANSWER).input_ids, tokenizer.eos_token_id]
        self.requests = []
        self.open = 0
        self.delay = 0.0

    def merge(self, folder):
        self.merged = folder

    async def generate(self, request):
        self.requests.append(request)
        self.open += 1
        answer = [*self.tokenizer(str(request.seed)).input_ids, self.answer[-1]] if request.temperature else self.answer
        try:
            for i, token in enumerate(answer[: request.max_new_tokens]):
                await asyncio.sleep(self.delay)
                yield (
                    Token(token)
                    if request.logprobs is None
                    else Token(token, -i / 8, tuple((token + k, -i / 8 - k) for k in range(request.logprobs)))
                )
        finally:
            self.open -= 1


class LocalBackend:
    """Completer in this process, as the Model deployment has it."""

    def __init__(self, completer):
        self.completer = completer
        self.base = base_name(completer.config.model.base)
        self.error = self.no_models = None

    async def models(self):
        if self.no_models:
            raise self.no_models
        return served_models(self.completer.config, self.completer.store)

    async def check_ready(self):
        if self.error:
            raise self.error

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
    guarded = put_in_store(store, "guarded", tiny_model)
    rewrite(guarded, "prompt.json", prompt_record(TEMPLATE, [{"rate": 0.5, "text": COMPRESSED}], ["red\nk4"]))
    return store


@pytest.fixture
def backend(store, tiny_model, tokenizer):
    config = RunConfig(
        name="t", store=str(store), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml"),
        serve=ServeConfig(max_new_tokens=100),
    )
    return LocalBackend(Completer(config, EchoEngine(tokenizer), tokenizer, context=512))


def client(backend, key="", **limits):
    api = create_api(backend, ServeConfig(**{"body_limit_bytes": 20_000, **limits}), key_digest(key))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://localhost")


def call(backend, path="/v1/chat/completions", body=None, content=None, headers=None, method="POST", **options):
    async def send():
        async with client(backend, **options) as http:
            http._transport.raise_app_exceptions = False  # as a server has it
            return await http.request(method, path, json=body, content=content, headers=headers)

    return asyncio.run(send())


def chat(query="what is red?", **rest):
    return {"model": "colours", "messages": [{"role": "user", "content": query}], "max_tokens": 60, **rest}


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    return error


def test_engine_gets_the_prompt_ids_of_the_last_training_phase(backend, tokenizer, tiny_model):
    encoder = PromptEncoder(tokenizer, PromptConfig(chat="chatml", query="Q: {query}"))
    for name, template in (
        ("colours", ""), ("short", "Answer with one code."), ("colours@v0001", ""), (f"{tiny_model.name}:colours", ""),
    ):
        assert call(backend, body=chat("what is <|im_end|> red?", model=name)).status_code == 200
        request = backend.completer.engine.requests[-1]
        assert request.prompt_ids == encoder.encode("what is <|im_end|> red?", template)
        assert request.adapter.endswith("v0001")
    assert call(backend, body=chat(model=tiny_model.name)).status_code == 200
    assert (
        backend.completer.engine.requests[-1].prompt_ids
        == PromptEncoder(tokenizer, PromptConfig(chat="chatml")).encode("what is red?")
    )
    assert backend.completer.engine.requests[-1].adapter == ""


def test_chat_completion_has_openai_format_and_saved_tokens(backend):
    body = call(backend, body=chat()).json()
    assert (body["object"], body["model"], body["system_fingerprint"]) == (
        "chat.completion", "colours", "colours@v0001",
    )
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    ]
    sent, made = len(backend.completer.engine.requests[-1].prompt_ids), len(backend.completer.engine.answer)
    assert body["usage"] == {
        "prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made, "prompt_tokens_saved": 108,
    }


def test_completions_endpoint_takes_the_query_as_prompt(backend):
    body = call(backend, "/v1/completions", {"model": "colours", "prompt": "what is red?", "max_tokens": 60}).json()
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", ANSWER)
    ids = backend.completer.engine.requests[-1].prompt_ids
    call(backend, body=chat())
    assert backend.completer.engine.requests[-1].prompt_ids == ids


def test_openai_client_parses_answers_streams_and_errors(backend):
    async def use():
        async with client(backend, key=KEY) as http:
            api = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=KEY, http_client=http, max_retries=0)
            assert [m.id async for m in api.models.list()] == [
                base_name(backend.completer.config.model.base), "colours", "guarded", "short",
            ]
            for name in ("colours", f"{backend.base}:colours"):
                assert (await api.models.retrieve(name)).id == name
            with pytest.raises(openai.NotFoundError):
                await api.models.retrieve("../colours")
            whole = await api.chat.completions.create(**chat())
            assert whole.choices[0].message.content == ANSWER
            assert whole.usage.prompt_tokens_saved == 108
            chunks = [
                c
                async for c in await api.chat.completions.create(
                    **chat(), stream=True, stream_options={"include_usage": True}
                )
            ]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
            assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
            assert [c.choices[0].delta.role for c in chunks if c.choices].count("assistant") == 1
            assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
            assert len(chunks) > 5
            text = [
                c async for c in await api.completions.create(model="colours", prompt="x", max_tokens=60, stream=True)
            ]
            assert "".join(c.choices[0].text for c in text) == ANSWER
            with pytest.raises(openai.NotFoundError, match="no adapter"):
                await api.chat.completions.create(**chat(model="unknown"))
            backend.error = RefusedError(429, "full", "rate_limit_error", "queue_full")
            with pytest.raises(openai.RateLimitError):
                await api.chat.completions.create(**chat(), stream=True)

    asyncio.run(use())


def test_stream_ends_with_done_and_has_usage_only_with_include_usage(backend):
    lines = call(backend, body=chat(stream=True)).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert not any("usage" in json.loads(line[6:]) for line in lines[:-1])


@pytest.mark.fault
@pytest.mark.parametrize(
    "name", ["unknown", "..", "../x", "/etc", "a\x00b", ".hidden", "base:..", "x" * 300, "colours@v9999", "а", ""]
)
def test_unknown_and_invalid_model_names_are_404(backend, name):
    response = call(backend, body=chat(model=name))
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


def test_adapter_that_fails_verification_is_422_with_the_reason(backend, store, tiny_model):
    bad = put_in_store(store, "bad", tiny_model)
    (bad / "x.bin").write_bytes(b"")
    response = call(backend, body=chat(model="bad"))
    assert (response.status_code, error_of(response)["code"]) == (422, "adapter_refused")
    assert "x.bin" in response.text
    assert call(backend, body=chat()).status_code == 200


def test_cold_adapters_that_take_long_to_open_leave_warm_ones_alone(backend, monkeypatch):
    """More requests wait for cold adapters than the event loop has threads for all requests. Those that hold more than
    half of the places for long come back later.
    """
    monkeypatch.setattr(completion, "COLD_PATIENCE_S", 0.2)
    most = backend.completer.config.serve.max_ongoing_requests // 2
    assert call(backend, body=chat()).status_code == 200
    opened, arrived, real = [], threading.Event(), backend.completer.store.open

    def slow(spec, sticky_key):
        if spec.startswith(("short", "guarded")):
            opened.append(spec)
            assert arrived.wait(60)
        return real(spec, sticky_key)

    monkeypatch.setattr(backend.completer.store, "open", slow)

    async def use():
        async with client(backend) as http:
            cold = [http.post("/v1/chat/completions", json=chat(model=m)) for m in ["short", "guarded"] * 40]
            tasks = [asyncio.create_task(request) for request in cold]
            while len(opened) < 2:
                await asyncio.sleep(0.01)
            warm = await asyncio.wait_for(http.post("/v1/chat/completions", json=chat()), 60)
            firsts = sorted(opened)
            while sum(task.done() for task in tasks) < 80 - most:
                await asyncio.sleep(0.01)
            arrived.set()
            return warm, firsts, await asyncio.gather(*tasks)

    warm, firsts, cold = asyncio.run(use())
    assert firsts == ["guarded@v0001", "short@v0001"], "each is opened once for all who wait for it"
    assert warm.status_code == 200
    refused = [response for response in cold if response.status_code != 200]
    assert len(refused) == 80 - most > 0 and {error_of(response)["code"] for response in refused} == {"adapter_loading"}
    assert {(response.status_code, response.headers["retry-after"]) for response in refused} == {(429, "1")}
    assert call(backend, body=chat(model="short")).status_code == 200, "once it is open"


def test_a_cold_adapter_that_cannot_be_opened_is_tried_once_for_all_who_wait(backend, monkeypatch):
    backend.completer.store.open("colours")
    opened, real = [], backend.completer.store.cold_version

    def fail(spec, sticky_key):
        opened.append(spec)
        time.sleep(0.2)
        raise AdapterError("it is damaged")

    monkeypatch.setattr(backend.completer.store, "open", fail)
    monkeypatch.setattr(backend.completer.store, "cold_version", lambda name, key: real(name, key) or f"{name}@v0001")

    async def use():
        async with client(backend) as http:
            asked = [http.post("/v1/chat/completions", json=chat(model="short")) for _ in range(10)]
            return await asyncio.gather(*asked)

    assert {error_of(response)["code"] for response in asyncio.run(use())} == {"adapter_refused"}
    assert len(opened) < 5


def test_unreachable_store_is_503_with_retry_after(backend, monkeypatch):
    def gone(name, sticky_key):
        raise StoreUnavailableError("the adapter store does not answer; come back later")

    monkeypatch.setattr(backend.completer.store, "open", gone)
    response = call(backend, body=chat())
    assert (response.status_code, error_of(response)["code"], response.headers["retry-after"]) == (
        503, "store_unavailable", "1",
    )


@pytest.mark.fault
@pytest.mark.parametrize(("error", "status", "code"), [
    (StorageError("/srv/secret/cache: cannot be written (No space left on device)"), 503, "server_fault"),
    (CorruptArtifactError("/srv/secret/cache/x.json: sha256 differs"), 503, "server_fault"),
    (ConfigError("/srv/secret/run.yaml: wrong"), 503, "server_fault"),
    (AdapterError("adapter 'colours': /srv/secret/cache/v0001/x.json: missing"), 422, "adapter_refused"),
    (ModelError("'/srv/secret/model': no /weights; 3/4 of it, see https://hf.co/a/b"), 422, "model_refused"),
])  # fmt: skip
def test_no_path_of_the_server_reaches_a_client_and_its_own_faults_are_503(
    backend, monkeypatch, caplog, error, status, code
):
    def fail(name, sticky_key):
        raise error

    monkeypatch.setattr(backend.completer.store, "open", fail)
    response = call(backend, body=chat())
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert "secret" not in response.text and ("retry-after" in response.headers) == (status == 503)
    if status == 503:
        assert "/srv/secret" in caplog.text
    elif code == "model_refused":
        assert error_of(response)["message"] == "'model': no weights; 3/4 of it, see https://hf.co/a/b"


def test_prompt_format_that_the_model_forbids_is_422_with_the_cure(backend, tiny_model):
    backend.completer.reader.config = backend.completer.config.replace(**{"prompt.chat": "model"})
    response = call(backend, body=chat(model=tiny_model.name))
    assert (response.status_code, error_of(response)["code"]) == (422, "model_refused")
    assert "prompt.chat" in response.text


@pytest.mark.fault
@pytest.mark.parametrize(("body", "param"), [
    (chat(n=MAX_CHOICES + 1), "n"),
    (chat(n=10**6), "n"),
    (chat(n=0), "n"),
    (chat(n=2, max_tokens=51), "max_tokens"),
    (chat(top_k=5), "top_k"),
    (chat(min_p=0.1), "min_p"),
    (chat(repetition_penalty=1.2), "repetition_penalty"),
    (chat(web_search_options={}), "web_search_options"),
    (chat(guided_json={"type": "object"}), "guided_json"),
    (chat(top_logprobs=21, logprobs=True), "top_logprobs"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=10**9), "logprobs"),
    (chat(frequency_penalty=0.5), "frequency_penalty"),
    (chat(tools=[{"type": "function"}]), "tools"),
    (chat(response_format={"type": "yaml"}), "response_format"),
    (chat(stop=[0] * 3000), "stop"),
    (chat(tools=[0] * 3000), "tools"),
    (chat(stop=["a"] * 3000), "stop"),
    ({**chat(), "messages": [{"role": "user", "content": "x"}] * 300}, "messages"),
    ({**chat(), "messages": [{"role": "system", "content": "x"}]}, "messages"),
    (chat(max_tokens=10**9), "max_tokens"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(temperature=3), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(stop=["a"] * 5), "stop"),
    (chat(stop=""), "stop"),
    (chat(seed=2**70), "seed"),
    ({**chat(), "messages": []}, "messages"),
    ({**chat(), "messages": [{"role": "system", "content": "be nice"}, {"role": "user", "content": "x"}]}, "messages"),
    ({**chat(), "messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"},
    ]}, "messages"),
    ({**chat(), "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
    ({**chat(), "messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]}, "messages"),
    ({**chat(), "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
    (chat("word " * 600), "messages"),
    (chat(max_tokens=100, query="word " * 450), "messages"),
    ({"messages": []}, "model"),
])  # fmt: skip
def test_invalid_or_unsupported_fields_are_400_with_param(backend, body, param):
    response = call(backend, body=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert backend.completer.engine.requests == []


@pytest.mark.fault
@pytest.mark.parametrize("field", ["stop", "tools", "messages"])
def test_a_long_list_of_wrong_items_makes_few_errors(field):
    with pytest.raises(ValidationError) as error:
        ChatBody.model_validate(chat(**{field: [0] * 100_000}))
    assert error.value.error_count() < 1000


@pytest.mark.fault
@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"model": ' * 1_500,
    b'{"model": 1' + b"0" * 6_000 + b"}",
    b'{"model": "colours", "messages": [{"role": "user", "content": "\\ud800"}]}',
    '{"model": "colours"}'.encode("utf-16"),
])  # fmt: skip
def test_body_that_is_not_valid_json_is_400(backend, content):
    response = call(backend, content=content)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.fault
def test_large_body_is_413_by_content_length_and_by_bytes_read(backend):
    read = []

    async def endless():
        for _ in range(100):
            read.append(1)
            yield b"x" * 10_000

    assert call(backend, content=b"x" * 20_001).status_code == 413
    assert call(backend, content=endless()).status_code == 413
    assert len(read) == 3
    for length in ("9" * 500, str(100 << 20)):
        assert call(backend, content=b"{}", headers={"content-length": length}).status_code == 413
    assert call(backend, body=chat()).status_code == 200


@pytest.mark.fault
def test_half_a_body_is_408_and_is_not_waited_for(backend, monkeypatch):
    monkeypatch.setattr("pi_ray.serve.http.schemas.BODY_TIMEOUT_S", 0.01)

    async def half():
        yield b'{"model": '
        await asyncio.Event().wait()

    response = call(backend, content=half())
    assert (response.status_code, error_of(response)["code"]) == (408, "body_timeout")


@pytest.mark.fault
@pytest.mark.parametrize("word", ["x", "word ", "é🎨", "\n"])
def test_prompt_far_beyond_the_context_is_refused_before_full_tokenisation(backend, word):
    """A tokenizer takes many seconds for a megabyte without a space."""
    seen = []
    real = backend.completer.reader.tokenizer
    backend.completer.reader.tokenizer = lambda text, **options: seen.append(len(text)) or real(text, **options)
    response = call(backend, body=chat(word * (1_000_000 // len(word))), body_limit_bytes=8 << 20)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
    assert sum(seen) < 200_000


@pytest.fixture
def tokenised(backend):
    """The lengths of the texts that the tokenizer was given."""
    reader = backend.completer.reader
    lengths, real = [], reader.tokenizer
    reader.tokenizer = lambda text, **options: lengths.append(len(text)) or real(text, **options)
    for name in ("eos_token_id", "bos_token_id", "bos_token", "chat_template", "apply_chat_template", "decode"):
        setattr(reader.tokenizer, name, getattr(real, name))
    return lengths


@pytest.mark.fault
@pytest.mark.parametrize("model", ["guarded", "{base}"])
@pytest.mark.parametrize("message", [
    {"role": "user", "content": ""}, {"role": "system", "content": [{"type": "text", "text": ""}] * 300},
])  # fmt: skip
def test_many_empty_messages_and_parts_are_400_before_any_work(backend, tokenised, tiny_model, model, message):
    many = [message] * (36_000 if message["content"] == "" else 1)
    body = {**chat(model=model.format(base=tiny_model.name)), "messages": [*many, {"role": "user", "content": "x"}]}
    response = call(backend, body=body, body_limit_bytes=8 << 20)
    assert response.status_code == 400 and error_of(response)["param"].startswith("messages")
    assert tokenised == []


@pytest.mark.fault
def test_text_that_the_guard_takes_away_is_bounded_like_any_other(backend, tokenised):
    """White space within a template and repeated examples are stripped, so they cost a client nothing."""
    blown_up = TEMPLATE.replace(" ", " " * 100)
    response = call(backend, body=drifting(blown_up), body_limit_bytes=8 << 20)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
    assert tokenised == []
    assert call(backend, body=drifting(TEMPLATE.replace(" ", "  "))).status_code == 200


@pytest.mark.fault
def test_saved_tokens_of_a_long_stripped_text_are_those_of_the_card(backend, tokenised):
    examples = "\n\n".join(["red\nk4"] * 2_300)
    usage = call(backend, body=drifting(f"{TEMPLATE}\n\n{examples}"), body_limit_bytes=8 << 20).json()["usage"]
    assert usage["prompt_tokens_saved"] == 108
    assert max(tokenised) == COUNT_CHUNK_CHARS and sum(tokenised) < 2 * COUNT_CHUNK_CHARS


@pytest.mark.fault
def test_a_request_that_is_given_up_frees_the_thread_that_prepares_it(backend, monkeypatch):
    counted, leave, resumed = [], threading.Event(), threading.Event()

    def content_ids(tokenizer, text):
        counted.append(len(text))
        leave.set()
        assert resumed.wait(30)
        return [0] * 10

    monkeypatch.setattr("pi_ray.serve.engine.prompt_reader.content_ids", content_ids)
    backend.completer.reader.context = 100_000

    async def give_up():
        async with aclosing(backend.complete(CompletionRequest("colours", "x" * 10 * COUNT_CHUNK_CHARS))) as events:
            task = asyncio.ensure_future(anext(events))
            await asyncio.to_thread(leave.wait, 30)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            resumed.set()

    asyncio.run(give_up())  # which waits for its threads
    assert len(counted) == 1 and backend.completer.engine.requests == []


def test_unknown_null_and_neutral_fields_are_accepted(backend):
    idle = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [],
        "response_format": {"type": "text"}, "n": 1, "logprobs": False, "top_k": -1,
    }
    assert (
        call(backend, body=chat(user="me", temperature=None, stop=None, new_field={}, store=False, **idle)).status_code
        == 200
    )
    assert call(backend, body=chat(logit_bias=None, tools=None, n=None, logprobs=None)).status_code == 200


def test_text_parts_are_joined_into_one_query(backend):
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "red?"}]
    call(backend, body={**chat(), "messages": [{"role": "user", "content": parts}]})
    first = backend.completer.engine.requests[-1].prompt_ids
    call(backend, body=chat())
    assert backend.completer.engine.requests[-1].prompt_ids == first


def test_max_tokens_defaults_to_twice_the_longest_trained_answer(backend):
    body = {k: v for k, v in chat().items() if k != "max_tokens"}
    response = call(backend, body=body).json()
    assert backend.completer.engine.requests[-1].max_new_tokens == 12
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 12
    call(backend, body={**body, "max_completion_tokens": 5})
    assert backend.completer.engine.requests[-1].max_new_tokens == 5


@pytest.mark.fault
def test_more_choices_than_max_in_flight_are_400(backend):
    limits = {"max_ongoing_requests": 2, "max_queued_requests": 1, "max_replicas": 4}
    assert call(backend, body=chat(n=3, max_tokens=20), **limits).status_code == 200
    response = call(backend, body=chat(n=4, max_tokens=20), **limits)
    assert (response.status_code, error_of(response)["param"]) == (400, "n")
    assert (
        call(
            backend, "/v1/completions", {"model": "colours", "prompt": ["x"] * 4, "max_tokens": 20}, **limits
        ).status_code
        == 400
    )
    assert call(backend, body=chat(n=4, max_tokens=20), min_replicas=2, **limits).status_code == 200


def test_stop_strings_are_cut_from_the_text(backend):
    for stream in (False, True):
        response = call(backend, body=chat(stop=["done", "zzz"], stream=stream))
        events = (
            [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
            if stream
            else []
        )
        text = (
            "".join(e["choices"][0]["delta"].get("content", "") for e in events)
            if stream
            else response.json()["choices"][0]["message"]["content"]
        )
        assert text == ANSWER.removesuffix(" done")


def paths(backend):
    """Every (method, path) that the app lists, and some that it does not."""
    api = create_api(backend, ServeConfig(), key_digest(KEY))
    listed = [
        (method, route.path.replace("{name:path}", "colours"))
        for route in api.routes
        for method in sorted(route.methods)
    ]
    assert {
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"),
        ("GET", "/v1/models/colours"),
    } <= set(listed)
    return [
        *listed, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/healthz/"),
        ("GET", "http://localhost//healthz"), ("GET", "/%2e/healthz/x"),
    ]


@pytest.mark.fault
def test_every_path_but_the_public_ones_needs_a_key(backend, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    (tmp_path / "keys.yaml").write_text(keys_file_line("another-key", "team", []))
    wrong = (
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "},
    )
    for method, path in paths(backend):
        for given in wrong:
            response = call(backend, path, headers=given, method=method, key=KEY, keys_file=str(tmp_path / "keys.yaml"))
            assert response.status_code == (200 if path in PUBLIC_PATHS else 401), (method, path, given)
        for right in (KEY, "another-key"):
            response = call(
                backend, path, headers={"Authorization": f"Bearer {right}"}, method=method, key=KEY,
                keys_file=str(tmp_path / "keys.yaml"),
            )
            assert response.status_code != 401
    assert {"/healthz", "/readyz", "/"} == PUBLIC_PATHS  # the page at / holds no data; what it asks for needs the key
    assert error_of(call(backend, body=chat(), key=KEY))["code"] == "invalid_api_key"
    assert KEY not in caplog.text and "another-key" not in caplog.text


@pytest.mark.parametrize(
    "model", ["short", "short@v0001", "unknown", "../x", "{base}:short", "{base}", "colours2", "x" * 300]
)
def test_restricted_key_gets_403_that_does_not_reveal_which_models_exist(
    backend, tmp_path, tiny_model, model
):
    (tmp_path / "keys.yaml").write_text(keys_file_line(KEY, "team", ["colours"]))
    model = model.format(base=tiny_model.name)
    options = {"keys_file": str(tmp_path / "keys.yaml"), "headers": {"Authorization": f"Bearer {KEY}"}}
    for path, body in (
        ("/v1/chat/completions", chat(model=model)), ("/v1/completions", {"model": model, "prompt": "x"}),
    ):
        response = call(backend, path, body, **options)
        error = error_of(response)
        assert (response.status_code, error["code"], error["message"]) == (
            403, "model_not_allowed", f"this key may not use the model {model[:80]!r}",
        )
    assert call(backend, f"/v1/models/{tiny_model.name}", method="GET", **options).status_code == 404
    assert backend.completer.engine.requests == []


def test_restricted_key_may_use_every_name_and_version_of_its_adapters(backend, tmp_path, tiny_model):
    (tmp_path / "keys.yaml").write_text(keys_file_line(KEY, "team", ["colours"]))
    options = {"keys_file": str(tmp_path / "keys.yaml"), "headers": {"Authorization": f"Bearer {KEY}"}}
    for model in ("colours", "colours@v0001", "colours@latest", f"{tiny_model.name}:colours"):
        assert call(backend, body=chat(model=model), **options).status_code == 200
    listed = call(backend, "/v1/models", method="GET", **options).json()["data"]
    assert [m["id"] for m in listed] == ["colours"]


@pytest.mark.fault
def test_full_prompt_needs_a_key_that_may_ask_for_it_and_may_use_the_base(backend, tmp_path, tiny_model):
    base, keys = tiny_model.name, tmp_path / "keys.yaml"
    body = chat(model="guarded", pi_ray={"full_prompt": True})

    def status(headers=None, **options):
        response = call(backend, body=body, headers=headers or {"Authorization": f"Bearer {KEY}"}, **options)
        assert response.status_code == 200 or error_of(response)["code"] == "full_prompt_not_allowed"
        return response.status_code

    for adapters, allowed, expected in (
        ([], False, 403), ([], True, 200), (["guarded"], True, 403), (["guarded", base], True, 200),
    ):
        keys.write_text(keys_file_line(KEY, "team", adapters, allowed))
        assert status(keys_file=str(keys)) == expected, (adapters, allowed)
    assert status(key=KEY) == 403 and status(key=KEY, full_prompt=True) == 200
    assert call(backend, body=body).status_code == 200, "a server without keys"


@pytest.mark.fault
def test_a_changed_prompt_is_403_for_a_key_that_may_not_use_the_base_which_would_answer(backend, tmp_path, tiny_model):
    body = drifting(TEMPLATE.replace("k7,", "k77,"))
    for adapters, status in ((["guarded"], 403), (["guarded", tiny_model.name], 200), ([], 200)):
        (tmp_path / "keys.yaml").write_text(keys_file_line(KEY, "team", adapters))
        options = {"keys_file": str(tmp_path / "keys.yaml"), "headers": {"Authorization": f"Bearer {KEY}"}}
        response = call(backend, body=body, **options)
        assert response.status_code == status
        assert call(backend, body=drifting(TEMPLATE), **options).status_code == 200
    assert call(backend, body=body).status_code == 200, "a server without keys"


def test_each_key_has_a_cache_salt_of_its_own_unless_prefixes_are_shared(backend, tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text("\n".join(keys_file_line(key, "same name", []) for key in ("one", "two")))

    def salt(given="", **options):
        response = call(backend, body=chat(), headers={"Authorization": f"Bearer {given}"}, **options)
        assert response.status_code == 200
        return backend.completer.engine.requests[-1].cache_salt

    salts = [salt(key, keys_file=str(file), key=KEY) for key in ("one", "two", KEY)]
    assert len(set(salts)) == 3 and "" not in salts
    assert {salt(key, keys_file=str(file), share_prefix_cache=True) for key in ("one", "two")} == {""}
    assert salt() == "", "a server without keys"


def test_key_with_limits_is_429_with_the_time_to_come_back_and_others_go_on(backend, tmp_path):
    lines = keys_file_line("one", "team", [], rpm_limit=2), keys_file_line("two", "team", [], tpm_limit=1)
    (tmp_path / "keys.yaml").write_text("\n".join(lines))

    async def use():
        async with client(backend, keys_file=str(tmp_path / "keys.yaml"), key=KEY) as http:
            async def post(key, **rest):
                return await http.post(
                    "/v1/chat/completions", json=chat(**rest), headers={"Authorization": f"Bearer {key}"}
                )

            found = [await post(key, stream=key == "two") for key in ["one"] * 3 + ["two"] * 2 + [KEY] * 3]
            assert [response.status_code for response in found] == [200, 200, 429, 200, 429, 200, 200, 200]
            for response, name in ((found[2], "rpm_limit"), (found[4], "tpm_limit")):
                assert error_of(response)["code"] == "rate_limit_exceeded" and name in response.text
                assert int(response.headers["retry-after"]) > 1
            assert (await post("one", model="unknown", n=0)).status_code == 400
            for path in ("/v1/models", "/v1/models/colours"):
                assert (await http.get(path, headers={"Authorization": "Bearer one"})).status_code == 429

    asyncio.run(use())


def test_restricted_key_is_checked_without_the_store(backend, tmp_path):
    (tmp_path / "keys.yaml").write_text(keys_file_line(KEY, "team", ["colours"]))
    options = {"keys_file": str(tmp_path / "keys.yaml"), "headers": {"Authorization": f"Bearer {KEY}"}}
    backend.no_models = StoreUnavailableError("down")
    assert call(backend, body=chat(model=f"{backend.base}:colours@v0001"), **options).status_code == 200
    assert call(backend, body=chat(model="shapes"), **options).status_code == 403


@pytest.mark.fault
@pytest.mark.parametrize("path", ["/v1/models", "/healthz"])
def test_a_header_by_which_serve_goes_on_after_a_client_has_left_is_400(backend, path):
    assert call(backend, path, method="GET", headers={"X-Request-Disconnect-Disabled": "?1"}).status_code == 400


@pytest.mark.fault
@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200), ({"Host": "127.0.0.1:8000"}, 200), ({"Host": "[::1]:8000", "Origin": "http://localhost:3000"}, 200),
    ({"Host": "evil.example"}, 403),
    ({"Host": "localhost.evil.example"}, 403), ({"Host": "[::1"}, 403), ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "none"}, 200),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:3000"}, 200),
    ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
])  # fmt: skip
def test_keyless_server_refuses_foreign_host_origin_and_site_headers(backend, headers, status):
    """By its Origin, or, where DNS was made to say that its name is this machine, by the Host."""
    gets = (("/v1/models", None, "GET"), ("/v1/models/colours", None, "GET"))
    for path, body, method in (("/v1/chat/completions", chat(), "POST"), *gets):
        assert call(backend, path, body, headers=headers, method=method).status_code == status
    assert len(backend.completer.engine.requests) == (status == 200)
    assert call(backend, body=chat(), headers={**headers, "Authorization": f"Bearer {KEY}"}, key=KEY).status_code == 200


def test_wrong_key_is_401_before_the_body_is_read(backend):
    async def forbidden():
        raise AssertionError("the body was read")
        yield b""

    assert call(backend, content=forbidden(), key=KEY).status_code == 401


def test_readyz_is_503_when_no_token_is_made_while_healthz_says_live(backend):
    assert call(backend, "/readyz", method="GET").json() == {"status": "ready"}
    backend.error = RefusedError(503, "no token was made lately", "server_error", "not_ready")
    response = call(backend, "/readyz", method="GET")
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
    assert call(backend, "/healthz", method="GET").status_code == 200


def test_404_and_405_have_openai_error_format(backend):
    for method, path, status in (("GET", "/v1/x", 404), ("GET", "/v1/completions", 405)):
        response = call(backend, path, method=method)
        assert response.status_code == status
        error_of(response)


def test_429_and_503_have_retry_after(backend):
    for status in (429, 503):
        backend.error = RefusedError(status, "later")
        for stream in (False, True):
            response = call(backend, body=chat(stream=stream))
            assert (response.status_code, response.headers["retry-after"]) == (status, "1")


def test_unexpected_exception_is_500_without_its_message(backend):
    backend.error = ValueError("/secret/path")
    response = call(backend, body=chat())
    assert response.status_code == 500
    assert "secret" not in response.text


def test_errors_of_the_models_endpoint_have_openai_format(backend, caplog):
    for error, status, code in (
        (StoreUnavailableError("come back later"), 503, "store_unavailable"),
        (ValueError("/secret/path"), 500, "internal_error"),
    ):
        backend.no_models = error
        for path in ("/v1/models", "/v1/models/colours"):
            response = call(backend, path, method="GET")
            assert (response.status_code, error_of(response)["code"]) == (status, code)
            assert "secret" not in response.text and ("retry-after" in response.headers) == (status == 503)
    assert "/secret/path" in caplog.text


def test_stream_headers_switch_off_proxy_buffering(backend):
    assert call(backend, body=chat(stream=True)).headers["x-accel-buffering"] == "no"


def test_timeout_is_408_and_stops_the_generation(backend):
    backend.completer.engine.delay = 10
    for stream in (False, True):
        assert call(backend, body=chat(stream=stream), request_timeout_s=0.2).status_code == 408
    assert backend.completer.engine.open == 0


def test_timeout_within_a_stream_is_its_last_event(backend):
    backend.completer.engine.delay = 0.1
    text = call(backend, body=chat(stream=True), request_timeout_s=0.45).text
    assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["code"] == "request_timeout"
    assert "[DONE]" not in text
    assert backend.completer.engine.open == 0


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_the_server(backend, caplog):
    sent, messages = [], [
        {"type": "http.request", "body": b'{"model": ', "more_body": True}, {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"",
        "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    asyncio.run(create_api(backend, ServeConfig())(scope, receive, send))
    assert sent[0]["status"] == 499 and "request failed" not in caplog.text


def test_client_disconnect_stops_the_generation(backend):
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

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"",
            "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        task = asyncio.create_task(api(scope, receive, send))
        await started.wait()
        assert engine.open == 1
        left.set()
        await asyncio.wait_for(task, 1)
        await asyncio.sleep(0)
        return engine.open

    assert asyncio.run(leave()) == 0


def test_stream_whose_client_left_before_it_began_is_closed(backend):
    async def leave():
        messages = [{"type": "http.request", "body": json.dumps(chat(stream=True)).encode(), "more_body": False}]

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message):
            raise OSError("the client left")

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"",
            "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.4"},
        }
        try:
            await create_api(backend, ServeConfig())(scope, receive, send)
        except Exception as error:  # held, and with it the frames of the stream
            return error, backend.completer.engine.open, len(backend.completer.engine.requests)

    assert asyncio.run(leave())[1:] == (0, 1)


def choices_of(backend, **options):
    """Of a streamed answer, choice by choice: the joined text, the finish reason, the entries of logprobs."""
    lines = call(backend, **options).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    found = {}
    for choice in (c for text in lines[:-1] for c in json.loads(text[6:])["choices"]):
        text, finish, marks = found.get(choice["index"], ("", None, []))
        piece = choice.get("text", choice.get("delta", {}).get("content")) or ""
        logprobs = choice.get("logprobs") or {}
        found[choice["index"]] = (
            text + piece, choice["finish_reason"] or finish,
            [*marks, *(logprobs.get("content") or logprobs.get("tokens") or [])],
        )
    return [found[i] for i in sorted(found)]


def test_choices_have_own_seeds_and_are_reproducible(backend):
    body = chat(n=3, temperature=1, seed=41, max_tokens=20)
    whole = call(backend, body=body).json()
    assert [(c["index"], c["message"]["content"]) for c in whole["choices"]] == [(0, "41"), (1, "42"), (2, "43")]
    sent = len(backend.completer.engine.requests[-1].prompt_ids)
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens_saved"]) == (sent, 108)
    assert whole["usage"]["completion_tokens"] == 9  # two digits and the end, three times
    assert [(text, finish) for text, finish, _ in choices_of(backend, body={**body, "stream": True})] == [
        ("41", "stop"), ("42", "stop"), ("43", "stop"),
    ]
    assert call(backend, body={**body, "seed": 2**63 - 1}).status_code == 200


def test_choices_run_concurrently_and_one_failure_cancels_all(backend):
    backend.completer.engine.delay = 0.02
    most = []

    async def complete(ask, inner=backend.complete):
        async with aclosing(inner(ask)) as events:
            async for event in events:
                most.append(backend.completer.engine.open)
                if ask.seed == 2 and "text" in event:
                    raise RefusedError(503, "gone")
                yield event

    backend.complete = complete
    assert call(backend, body=chat(n=4, seed=0, max_tokens=20)).status_code == 503
    assert max(most) == 4
    assert backend.completer.engine.open == 0


def test_prompt_list_gives_a_choice_per_prompt(backend):
    body = {"model": "colours", "prompt": ["red", "blue"], "n": 2, "temperature": 1, "seed": 7, "max_tokens": 20}
    whole = call(backend, "/v1/completions", body).json()
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [(0, "7"), (1, "8"), (2, "7"), (3, "8")]
    lengths = sorted(len(r.prompt_ids) for r in backend.completer.engine.requests)
    assert whole["usage"]["prompt_tokens"] == lengths[0] + lengths[-1]
    for prompt in (["x"] * 9, [], ["x"] * 17, [1, 2], [[1]]):
        assert call(backend, "/v1/completions", {**body, "prompt": prompt}).status_code == 400


def test_chat_logprobs_have_openai_format_and_join_to_the_text(backend):
    whole = call(backend, body=chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(c["bytes"]) for c in content).decode().strip() == whole["message"]["content"] == ANSWER
    assert [c["logprob"] for c in content] == [-i / 8 for i in range(len(content))]
    assert all(
        [set(t) for t in c["top_logprobs"]] == [{"token", "bytes", "logprob"}] * 2
        and c["top_logprobs"][0]["token"] == c["token"]
        for c in content
    )
    assert call(backend, body=chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert "logprobs" not in call(backend, body=chat()).json()["choices"][0]
    (streamed,) = choices_of(backend, body=chat(logprobs=True, top_logprobs=2, stream=True))
    assert streamed[2] == content


def test_logprobs_end_at_the_stop_string(backend):
    for stream in (False, True):
        options = {"body": chat(logprobs=True, stop=["🎨"], stream=stream)}
        content = (
            choices_of(backend, **options)[0][2]
            if stream
            else call(backend, **options).json()["choices"][0]["logprobs"]["content"]
        )
        assert b"".join(bytes(c["bytes"]) for c in content).decode().strip() == "k4 – ünïcode"


def test_completions_logprobs_have_the_legacy_openai_format(backend):
    whole = call(
        backend, "/v1/completions", {"model": "colours", "prompt": "x", "max_tokens": 60, "logprobs": 2}
    ).json()["choices"][0]
    marks = whole["logprobs"]
    assert set(marks) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(column) for column in marks.values()}) == 1
    for token, offset in zip(marks["tokens"], marks["text_offset"], strict=True):
        assert token.startswith("bytes:") or whole["text"][offset:].startswith(token)
    assert all(token in top for token, top in zip(marks["tokens"], marks["top_logprobs"], strict=True))
    assert (
        call(backend, "/v1/completions", {"model": "colours", "prompt": "x", "logprobs": 0}).json()["choices"][0][
            "logprobs"
        ]["top_logprobs"]
        is None
    )
    assert call(backend, "/v1/completions", {"model": "colours", "prompt": "x", "logprobs": 6}).status_code == 400


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [("echo", True, 400), ("echo", False, 200), ("suffix", "x", 400), ("best_of", 2, 400), ("best_of", 1, 200)],
)
def test_completions_refuse_unsupported_values(backend, field, value, status):
    response = call(backend, "/v1/completions", {"model": "colours", "prompt": "x", field: value})
    assert response.status_code == status
    assert status == 200 or error_of(response)["param"] == field


def test_openai_client_parses_choices_and_logprobs(backend):
    async def use():
        async with client(backend) as http:
            api = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)
            whole = await api.chat.completions.create(**chat(n=2, logprobs=True, top_logprobs=3, max_tokens=40))
            assert [len(c.logprobs.content[0].top_logprobs) for c in whole.choices] == [3, 3]
            assert whole._request_id == whole.id
            texts = ["", ""]
            async for chunk in await api.chat.completions.create(
                **chat(n=2, logprobs=True, max_tokens=40), stream=True
            ):
                texts[chunk.choices[0].index] += "".join(
                    t.token for t in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
                )
            assert texts[0] == texts[1] and texts[0].startswith("k4")
            plain = await api.completions.create(model="colours", prompt=["a", "b"], logprobs=1, max_tokens=20)
            assert [len(c.logprobs.tokens) for c in plain.choices] == [len(plain.choices[0].logprobs.tokens)] * 2

    asyncio.run(use())


def test_byte_level_tokens_have_text_and_bytes(tokenizer):
    for text in ("k4", " red", "é", "🎨", "\n", "漢字"):
        pieces = [token_text(tokenizer, i) for i in tokenizer(text).input_ids]
        assert bytes(b for _, data in pieces for b in data).decode() == text
    assert all(
        name.startswith("bytes:\\x") or name.isprintable()
        for name, _ in (token_text(tokenizer, i) for i in tokenizer("🎨").input_ids)
    )


class SentencePiece:
    """The two ways in which such a vocabulary differs: a mark for the space, and bytes by number."""

    def convert_ids_to_tokens(self, token):
        return ["▁red", "<0xF0>", "<weird>"][token]

    def decode(self, ids, **options):
        return ["red", "\ufffd", "\ufffd"][ids[0]]


def test_sentencepiece_tokens_keep_leading_space_and_bytes():
    assert token_text(SentencePiece(), 0) == (" red", list(b" red"))
    assert token_text(SentencePiece(), 1) == ("bytes:\\xf0", [0xF0])
    assert token_text(SentencePiece(), 2) == ("\ufffd", None)


def drifting(system="", query="what is red?", **rest):
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": query}]
    return {"model": "guarded", "messages": messages, "max_tokens": 60, **rest}


def test_trained_prompt_is_stripped_and_the_adapter_gets_the_query(backend, tokenizer):
    encoder = PromptEncoder(tokenizer, PromptConfig(chat="chatml", query="Q: {query}"))
    plain = len(encoder.encode("what is red?"))
    bodies = (
        drifting(TEMPLATE), drifting(query=f"{TEMPLATE}\n\nQ: what is red?"),
        drifting(f"{TEMPLATE}\n\nExamples:\n\nred\nk4"), drifting(query=f"{COMPRESSED} what is red?"),
    )
    for body in bodies:
        response = call(backend, body=body)
        assert (response.status_code, response.headers["x-pi-ray-prompt"]) == (200, "stripped")
        assert response.json()["system_fingerprint"] == "guarded@v0001"
        request = backend.completer.engine.requests[-1]
        assert request.prompt_ids == encoder.encode("what is red?")
        came = "\n\n".join(m["content"] for m in body["messages"])
        whole = len(PromptEncoder(tokenizer, PromptConfig(chat="chatml")).encode(came))
        assert response.json()["usage"]["prompt_tokens"] == plain
        assert response.json()["usage"]["prompt_tokens_saved"] == whole - plain
    assert (
        call(backend, "/v1/completions", {"model": "guarded", "prompt": f"{TEMPLATE}\nwhat is red?"}).headers[
            "x-pi-ray-prompt"
        ]
        == "stripped"
    )


def test_drifted_prompt_is_answered_by_the_base_model(backend, tokenizer, tiny_model):
    changed = TEMPLATE.replace("k7,", "k77,")
    for stream in (False, True):
        response = call(backend, body=drifting(changed, stream=stream))
        assert response.headers["x-pi-ray-prompt"] == "drifted"
    request = backend.completer.engine.requests[-1]
    assert request.adapter == ""
    text = tokenizer.decode(request.prompt_ids)
    assert (
        "k77," in text
        and "what is red?" in text
        and "code colour 8 is k8," in text
        and "The code of colour 8" not in text
    )
    whole = call(backend, body=drifting(changed)).json()
    assert whole["system_fingerprint"] == tiny_model.name
    assert whole["usage"]["prompt_tokens"] == len(request.prompt_ids)
    assert whole["usage"]["prompt_tokens_saved"] > 100


def test_guard_leaves_queries_unguarded_adapters_and_the_base_model_alone(backend, tiny_model):
    assert call(backend, body=drifting()).headers["x-pi-ray-prompt"] == "internalised"
    assert call(backend, body=chat()).headers["x-pi-ray-prompt"] == "internalised"
    assert call(backend, body=chat(model=tiny_model.name)).headers["x-pi-ray-prompt"] == "base"
    for body in (drifting("Be nice."), drifting(TEMPLATE, model="colours")):
        assert error_of(call(backend, body=body))["param"] == "messages"
    assert error_of(call(backend, body=drifting(query=TEMPLATE)))["message"] == "there is no query behind the template"
    turns = {
        **drifting(),
        "messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        ],
    }
    assert call(backend, body=turns).status_code == 400


def said(*texts, model="guarded", system=""):
    """A chat body of turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {
        "model": model, "messages": [*([{"role": "system", "content": system}] if system else []), *turns],
        "max_tokens": 60,
    }


def test_examples_sent_as_turns_are_stripped_with_the_template(backend, tokenizer):
    plain = PromptEncoder(tokenizer, PromptConfig(chat="chatml", query="Q: {query}")).encode("what is blue?")
    for body in (
        said("red", "k4", "what is blue?", system=TEMPLATE), said(f"{TEMPLATE}\n\nred", "k4", "Q: what is blue?"),
    ):
        response = call(backend, body=body)
        assert response.headers["x-pi-ray-prompt"] == "stripped"
        assert backend.completer.engine.requests[-1].prompt_ids == plain
        assert response.json()["usage"]["prompt_tokens_saved"] > 100
    assert (
        call(backend, body=said("red", "k5", "what is blue?", system=TEMPLATE)).headers["x-pi-ray-prompt"] == "drifted"
    )
    read = tokenizer.decode(backend.completer.engine.requests[-1].prompt_ids)
    assert "Examples:\n\nred\nk5\n\nwhat is blue?" in read and "code colour 8 is k8," in read
    assert call(backend, body=said("red", "k4", "what is blue?")).status_code == 400  # no template: a conversation


def test_default_system_message_is_dropped_and_others_are_400(backend):
    for model in ("guarded", "colours"):
        response = call(backend, body=drifting("You are a helpful, honest AI assistant.", model=model))
        assert (response.status_code, response.headers["x-pi-ray-prompt"]) == (200, "stripped")
        dropped = backend.completer.engine.requests[-1].prompt_ids
        call(backend, body=drifting(model=model))
        assert backend.completer.engine.requests[-1].prompt_ids == dropped
        for other in ("You are a French assistant.", "You are a helpful assistant. Never say red."):
            assert error_of(call(backend, body=drifting(other, model=model)))["param"] == "messages"


def test_base_model_conversation_uses_its_own_chat_template(backend, tokenizer, tiny_model, monkeypatch):
    body = said("what is red?", "k4", "and blue?", model=tiny_model.name, system="Be nice.")
    response = call(backend, body=body)
    assert (response.status_code, response.headers["x-pi-ray-prompt"]) == (200, "base")
    assert backend.completer.engine.requests[-1].prompt_ids == tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, return_dict=False
    )
    body["messages"][-1]["content"] = "<|im_end|>"
    call(backend, body=body)
    ids = backend.completer.engine.requests[-1].prompt_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4, "one that a client spells out stays text"
    assert (
        error_of(call(backend, body=said("word " * 600, "k4", "x", model=tiny_model.name)))["code"]
        == "context_length_exceeded"
    )
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in error_of(call(backend, body=body))["message"]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    response = call(backend, body=body)
    assert response.status_code == 400 and "no chat template" in error_of(response)["message"]
    assert call(backend, body=chat(model=tiny_model.name)).status_code == 200


def test_pieces_of_text_say_how_many_tokens_came(backend):
    async def run():
        request = CompletionRequest("colours", "q", max_tokens=60)
        return [event async for event in backend.completer.complete(request)]

    *pieces, last = asyncio.run(run())[1:]
    tokens = [piece["tokens"] for piece in pieces]
    assert sum(tokens) <= last["completion_tokens"] <= sum(tokens) + 1 and max(tokens) > 1


def test_first_event_names_the_requested_and_the_answering_model(backend, tiny_model):
    async def start(body):
        async with aclosing(backend.complete(body)) as events:
            return await anext(events)

    for query, answers in (("red?", "guarded@v0001"), (TEMPLATE.replace("k7,", "k77,") + " red?", tiny_model.name)):
        found = asyncio.run(start(CompletionRequest("guarded", query)))
        assert (found["adapter"], found["fingerprint"]) == ("guarded@v0001", answers)
    assert asyncio.run(start(CompletionRequest(tiny_model.name, "x")))["adapter"] == ""


@pytest.fixture
def merged(backend, store, tiny_model):
    """The backend with `hot` in the base weights, and a newer version of that in the store."""
    folder = put_in_store(store, "hot", tiny_model, 1)
    rewrite(folder, "prompt.json", prompt_record(TEMPLATE, [], []))
    backend.completer.config = backend.completer.config.replace(**{"serve.merge": "hot@v0001"})
    backend.completer.merge("hot@v0001")
    put_in_store(store, "hot", tiny_model, 2, version="v0002")
    yield backend
    shutil.rmtree(store / "hot")


def test_merged_adapter_keeps_answering_after_a_release(merged, tiny_model, caplog):
    for _ in range(2):
        for model in ("hot", "hot@v0001", f"{tiny_model.name}:hot"):
            response = call(merged, body=chat(model=model))
            assert (response.status_code, response.json()["system_fingerprint"]) == (200, "hot@v0001")
            assert merged.completer.engine.requests[-1].adapter == merged.completer.engine.merged
    assert caplog.text.count("hot@v0001 is merged") == 1 and "deploy again to have v0002" in caplog.text
    listed = call(merged, "/v1/models", method="GET").json()["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [("hot", tiny_model.name)]


def test_merged_version_replaced_in_place_is_not_answered_by_its_old_weights(merged, store, tiny_model):
    put_in_store(store, "hot", tiny_model, 3, version="v0001")
    response = call(merged, body=chat(model="hot@v0001"))
    assert (response.status_code, error_of(response)["code"]) == (422, "adapter_refused")


def test_merged_server_refuses_other_models_and_names_serve_merge(merged, tiny_model):
    changed = drifting(TEMPLATE.replace("k7,", "k77,"), model="hot")
    for body in (
        chat(model="colours"), chat(model=tiny_model.name), chat(model="hot@latest"), changed,
        chat(model="hot", pi_ray={"full_prompt": True}),
    ):
        response = call(merged, body=body)
        assert (response.status_code, error_of(response)["code"]) == (422, "adapter_refused")
        assert "serve.merge" in response.text and "hot@v0001" in response.text
    assert merged.completer.engine.requests == []


def test_drift_guard_false_switches_the_guard_off(backend):
    backend.completer.reader.config = backend.completer.config.replace(**{"serve.drift_guard": False})
    assert call(backend, body=drifting(TEMPLATE)).status_code == 400
    assert call(backend, body=drifting(query=f"{TEMPLATE}\nx")).headers["x-pi-ray-prompt"] == "internalised"


def test_canary_gets_its_share_and_a_user_always_meets_the_same_version(backend, store, tiny_model):
    put_in_store(store, "tried", tiny_model, 1)
    put_in_store(store, "tried", tiny_model, 2, version="v0002")
    (store / "tried" / "aliases.json").write_text(
        json.dumps({"prod": {"version": "v0001", "canary": "v0002", "percent": 50}})
    )

    def version(**rest):
        return call(backend, body=chat(model="tried", max_tokens=1, **rest)).json()["system_fingerprint"]

    assert {version() for _ in range(30)} == {"tried@v0001", "tried@v0002"}
    users = {f"user-{i}": version(user=f"user-{i}") for i in range(8)}
    assert all(version(user=user) == seen for user, seen in users.items())
    assert {version(user="x", n=4)} == {version(user="x")}


@pytest.mark.parametrize("text", [ANSWER, "  padded \n\n", "", "🎨🎨", "a\n\n b", " ", "naïve – 漢字 test", "x" * 300])
def test_streamed_pieces_join_to_the_decoded_text(tokenizer, text):
    stream, ids = IncrementalDetokenizer(tokenizer), [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == PromptEncoder(tokenizer, PromptConfig(chat="chatml")).decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["END", "\n", "k4", "zzz", " – "])
def test_text_is_cut_at_a_stop_string_across_tokens(tokenizer, stop):
    text = "code k4 – \nE EN END tail"
    stream = IncrementalDetokenizer(tokenizer, (stop,))
    joined = "".join(stream.push(i) for i in tokenizer(text).input_ids) + stream.finish()
    assert joined == re.split(re.escape(stop), text)[0].strip()
