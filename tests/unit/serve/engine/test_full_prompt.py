"""`pi_ray: {full_prompt: true}`: what the page compares an adapter with, the base model's answer to the adapter's whole
prompt.
"""

import asyncio

import httpx
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Token
from pi_ray.serve.engine.completion import Completer
from pi_ray.serve.http.api import create_api
from pi_ray.store.prompt_guard import prompt_record
from tests.lora import put_in_store, rewrite

TEMPLATE = "You answer with one code.\n\n## Codes\n\nred: k4"
QUERY = "what is red?"


class Seen:
    def __init__(self, tokenizer):
        self.end, self.requests = tokenizer.eos_token_id, []

    async def generate(self, request):
        self.requests.append(request)
        yield Token(self.end)


class Local:
    base = "base"

    def __init__(self, completer):
        self.complete = completer.complete
        self.store = completer.store

    async def models(self):
        return ["base", *self.store.names()]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelConfig(base=str(tiny_model)))


@pytest.fixture
def ask(tiny_model, tokenizer, tmp_path):
    folder = put_in_store(tmp_path, "colours", tiny_model)
    rewrite(folder, "prompt.json", prompt_record(TEMPLATE, [], []))
    put_in_store(tmp_path, "bare", tiny_model)
    config = RunConfig(
        name="t", store=str(tmp_path), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="none")
    )
    engine = Seen(tokenizer)
    api = create_api(Local(Completer(config, engine, tokenizer, 512)), ServeConfig())

    def send(model="colours", **rest):
        async def post():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://localhost") as http:
                return await http.post(
                    "/v1/chat/completions",
                    json={"model": model, "messages": [{"role": "user", "content": QUERY}], **rest},
                )

        return asyncio.run(post()), engine.requests

    return send


def test_the_base_model_reads_the_whole_template_in_the_adapters_own_format(ask, tokenizer):
    reply, requests = ask(pi_ray={"full_prompt": True})
    encoder = PromptEncoder(tokenizer, PromptConfig(chat="chatml", query="Q: {query}"))
    assert requests[-1].prompt_ids == encoder.encode(QUERY, TEMPLATE)
    assert requests[-1].adapter == ""
    assert reply.json()["usage"]["prompt_tokens_saved"] == 0 and "@" not in reply.json()["system_fingerprint"]
    _, requests = ask()
    assert requests[-1].adapter.endswith("colours/v0001") and requests[-1].prompt_ids == encoder.encode(QUERY)
    assert requests[-1].max_new_tokens == requests[-2].max_new_tokens


@pytest.mark.parametrize("model", ["bare", "base"])
def test_full_prompt_is_refused_without_an_adapter_that_has_its_prompt(ask, tiny_model, model):
    reply, _ = ask(tiny_model.name if model == "base" else model, pi_ray={"full_prompt": True})
    assert reply.status_code == 400 and "publish it again" in reply.json()["error"]["message"]


def test_an_unknown_key_of_the_pi_ray_block_is_refused(ask):
    assert ask(pi_ray={"full_promt": True})[0].status_code == 400
    assert ask(pi_ray={})[0].status_code == 200


def test_messages_that_the_whole_prompt_has_no_place_for_are_refused_and_not_dropped(ask):
    asked = {"role": "user", "content": QUERY}
    turn = [asked, {"role": "assistant", "content": "a"}]
    for before in ([{"role": "system", "content": "Answer in French."}], turn):
        reply, requests = ask(pi_ray={"full_prompt": True}, messages=[*before, asked])
        assert reply.status_code == 400 and not requests
        assert "send what the adapter gets" in reply.json()["error"]["message"]
