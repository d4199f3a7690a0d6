"""The serving benchmark compares like with like: the same ids, the same weights, answers of the same length."""

import argparse
import asyncio
import json
import shutil

import gguf
import pytest
import torch

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.models import load_model, load_tokenizer
from pi_ray.models.base_files import resolve_base
from pi_ray.prompt import PromptEncoder
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.llama_cpp import next_token_logprobs
from tests.bench import serve as bench
from tests.bench.llama_server import KINDS, write_gguf


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.make_models(folder, str(tiny_model))
    return folder


def test_the_peer_has_the_weights_of_the_base_with_the_adapter_that_is_served_beside_it(folder):
    base, merged = (load_model(ModelConfig(base=str(folder / name))) for name in ("base", "merged"))
    store, ids = AdapterStore(folder / "store", ModelConfig(base=str(folder / "base"))), torch.tensor([[5, 6, 7]])
    assert store.names() == [f"a{i}" for i in range(bench.ADAPTERS)]
    multi_lora = MultiLora(base, 1)
    with torch.inference_mode():
        bare = base(input_ids=ids).logits
        multi_lora.set_active_slots([multi_lora.load(str(store.open("a0").path))], 3)
        torch.testing.assert_close(base(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(bare, merged(input_ids=ids).logits, atol=1e-5)


def test_both_sides_read_the_same_ids_and_have_the_same_end_token(folder):
    tokenizer = load_tokenizer(ModelConfig(base=str(folder / "merged")))
    query = bench.queries(1)[0]
    ours = PromptEncoder(tokenizer, PromptConfig(chat="chatml", query=bench.QUERY)).encode(query)
    text = bench.QUERY.replace("{query}", query)
    assert ours == tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    assert (
        tokenizer.eos_token_id
        == load_model(ModelConfig(base=str(folder / "merged"))).generation_config.eos_token_id
        == len(tokenizer) - 1
    )


def test_a_client_measures_text_and_end_and_refuses_an_answer_of_another_length():
    from aiohttp import web

    async def answer(request):
        body = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        for event in (
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]}, {"choices": [{"delta": {"content": "x"}}]},
            {
                "choices": [],
                "usage": {"prompt_tokens": 9, "completion_tokens": body["max_tokens"] - (body["model"] == "short")},
            },
        ):  # fmt: skip
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def talk(model):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            return await bench.drive(
                f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", [(model, "q")] * 5, 3, 2
            )
        finally:
            await runner.cleanup()

    seconds, replies = asyncio.run(talk("whole"))
    assert len(replies) == 5 and all(
        0 < r.first <= r.whole <= seconds and (r.prompt, r.answer) == (9, 3) for r in replies
    )
    with pytest.raises(bench.FailedError, match="2 tokens, expected 3"):
        asyncio.run(talk("short"))


def test_ratios_are_of_requests_a_second_at_the_highest_concurrency():
    reply = bench.Reply(0.1, 0.2, 30, 16)
    level = lambda part, concurrency, seconds: bench.Level(part, concurrency, seconds, (reply,) * 10)  # noqa: E731
    found = [
        level(*x)
        for x in (
            ("full", 16, 10), ("full-cached", 16, 4), ("query", 1, 8), ("query", 16, 2), ("mixed8", 16, 2.5),
            ("merged", 16, 1), ("peer", 16, 5), ("constrained", 16, 2.5),
        )
    ]
    assert bench.figures(found, {"guard_ms": 7.0}) == pytest.approx({
        "query_over_full": 5, "query_over_full_cached": 2, "c16_over_c1": 4, "over_transformers_serve": 5,
        "unmerged_over_transformers_serve": 2.5, "mixed8_over_one": 0.8, "constrained_over_free": 0.8,
        "guard_ms": 7,
    })  # fmt: skip
    assert bench.figures(found[:1], {}) == {}


def test_the_guard_takes_away_what_its_part_sends(folder, tmp_path):
    shutil.copytree(folder / "store" / "a0", tmp_path / "store" / "a0")
    bench._publish_agent(tmp_path)
    agent = AdapterStore(tmp_path / "store").open("agent")
    assert agent.is_conversational and agent.guard.inspect(bench.POLICY, bench.TOOLS) == ("stripped", "")
    assert len(bench.POLICY) > 6_000 and len(json.dumps(bench.TOOLS)) > 12_000


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["serve", "--only", "query,pear"])
    with pytest.raises(SystemExit):
        bench._arguments()
    assert "no part pear" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["serve", "--only", "query", "--concurrency", "4,1"])
    assert isinstance(args := bench._arguments(), argparse.Namespace) and (args.only, args.concurrency) == (
        ["query"], [1, 4],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gets_the_weights_template_and_end_token_of_the_other_sides(tmp_path, kind):
    folder = resolve_base("smollm2-135m")
    path = write_gguf(folder, bench.CHAT, kind, tmp_path / "model.gguf")
    row = [1, 4093, 198, 314, 260]
    [found] = next_token_logprobs(path, None, [row])
    with torch.inference_mode():
        logits = load_model(ModelConfig(base=folder, dtype="float32"))(input_ids=torch.tensor([row])).logits[0, -1]
    expected = logits.log_softmax(-1)
    differences = [abs(value - float(expected[token])) for token, value in found.items()]
    rounding = {"F16": 0.02, "Q8_0": 0.3}[kind]  # Q8_0 rounds what it multiplies the weights with, too
    assert sum(differences) / len(differences) < rounding, differences
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == bench.CHAT
    assert fields["tokenizer.ggml.eos_token_id"].contents() == load_tokenizer(ModelConfig(base=folder)).eos_token_id
