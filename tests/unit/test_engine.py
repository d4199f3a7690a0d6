"""The transformers engine: the same tokens as transformers' own generate, one adapter per answer, slots that come back."""

import asyncio
import json
import struct
import threading

import pytest
import torch

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.errors import AdapterError
from pi_ray.protocols import GenerationRequest
from pi_ray.serving.engines import Slot, TransformersEngine
from tests.lora import put_in_store, rewrite

PROMPTS = [list(range(100, 110)), [7, 8, 9], list(range(500, 540))]
LENGTH = 12


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return [str(put_in_store(store, f"a{i}", tiny_model, seed=i)) for i in range(5)]


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig(max_loras=2))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(tiny_model, folders):
    """folder ("" for the base) -> the greedy tokens of each prompt, alone, by transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def greedy(model):
        return [model.generate(torch.tensor([p]), max_new_tokens=LENGTH, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS]

    return {"": greedy(AutoModelForCausalLM.from_pretrained(tiny_model))} | {
        folder: greedy(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)) for folder in folders
    }


async def tokens(engine, prompt, adapter="", **options):
    return [t async for t in engine.generate(GenerationRequest(prompt, **{"max_new_tokens": LENGTH, **options}, adapter=adapter))]


async def drained(engine):
    for _ in range(3000):
        if not engine.active:
            return True
        await asyncio.sleep(0.01)
    return False


def test_greedy_tokens_equal_transformers_generate_alone_and_in_a_batch(engine, expected):
    async def all_at_once():
        return await asyncio.gather(*(tokens(engine, p) for p in PROMPTS))

    assert asyncio.run(tokens(engine, PROMPTS[0])) == expected[""][0]
    assert asyncio.run(all_at_once()) == expected[""]


def test_the_adapters_give_different_answers(expected):
    assert len({json.dumps(answer) for answer in expected.values()}) == len(expected)


def test_concurrent_requests_for_more_adapters_than_fit_get_each_their_own(engine, expected, folders):
    jobs = [(folder, i) for _ in range(3) for folder in ["", *folders] for i in range(len(PROMPTS))]

    async def burst():
        return await asyncio.gather(*(tokens(engine, PROMPTS[i], folder) for folder, i in jobs))

    assert asyncio.run(burst()) == [expected[folder][i] for folder, i in jobs]
    assert len(engine._adapters) == 2
    assert asyncio.run(drained(engine))


def test_one_adapter_at_a_time_can_be_swapped_for_another(tiny_model, expected, folders):
    engine = TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig(max_loras=1))
    for folder in [*folders[:2], "", *folders[:2]]:
        assert asyncio.run(tokens(engine, PROMPTS[1], folder)) == expected[folder][1]
    engine.close()


def test_adapters_do_not_pile_up_in_memory(engine, folders):
    def parameters():
        return sum(1 for _ in engine._adapters.base.parameters())

    asyncio.run(tokens(engine, PROMPTS[1], folders[0], max_new_tokens=1))
    asyncio.run(tokens(engine, PROMPTS[1], folders[1], max_new_tokens=1))
    before = parameters()
    for i in range(20):
        asyncio.run(tokens(engine, PROMPTS[1], folders[i % 5], max_new_tokens=1))
    assert parameters() == before


def test_closing_the_iterator_frees_the_slot(engine):
    async def leave():
        stream = engine.generate(GenerationRequest(PROMPTS[0], 100_000))
        await anext(stream)
        assert engine.active == 1
        await stream.aclose()
        return await drained(engine)

    assert asyncio.run(leave())


def test_cancelling_the_caller_frees_the_slot_and_leaves_the_neighbour_alone(engine, expected):
    async def cancel():
        task = asyncio.create_task(tokens(engine, PROMPTS[0], max_new_tokens=100_000))
        neighbour = asyncio.create_task(tokens(engine, PROMPTS[1]))
        await asyncio.sleep(0.05)
        task.cancel()
        assert await neighbour == expected[""][1]
        return await drained(engine)

    assert asyncio.run(cancel())


def test_a_seed_gives_the_same_tokens_in_any_company(engine):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}

    async def together():
        return (await asyncio.gather(tokens(engine, PROMPTS[0], **options), tokens(engine, PROMPTS[2]), tokens(engine, PROMPTS[1], temperature=1.0)))[0]

    alone = asyncio.run(tokens(engine, PROMPTS[0], **options))
    assert asyncio.run(together()) == alone
    assert asyncio.run(tokens(engine, PROMPTS[0], **{**options, "seed": 8})) != alone


def test_top_p_keeps_the_smallest_set_that_holds_it():
    async def picks():
        logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        return {top_p: {Slot(GenerationRequest([1], 1, temperature=1.0, top_p=top_p, seed=s)).pick(logits) for s in range(200)} for top_p in (0.1, 0.6, 0.9, 1.0)}

    assert asyncio.run(picks()) == {0.1: {0}, 0.6: {0, 1}, 0.9: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_end_of_sequence_and_stop_strings_end_an_answer(engine, expected):
    stop = engine.tokenizer.decode(expected[""][0][:4])[-3:]
    got = asyncio.run(tokens(engine, PROMPTS[0], stop=(stop,)))
    assert got == expected[""][0][: len(got)]
    assert len(got) <= 4
    engine._ends.add(expected[""][0][5])
    got = asyncio.run(tokens(engine, PROMPTS[0]))
    engine._ends.discard(expected[""][0][5])
    assert got == expected[""][0][: expected[""][0].index(expected[""][0][5]) + 1]


def test_an_adapter_that_does_not_fit_the_base_fails_its_own_request_alone(engine, expected, folders, tiny_model, tmp_path):
    bad = put_in_store(tmp_path, "bad", tiny_model)
    data = (bad / "adapter_model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(b"layers.1", b"layers.9")
    rewrite(bad, "adapter_model.safetensors", data[:8] + header + data[8 + length :])

    async def both():
        return await asyncio.gather(tokens(engine, PROMPTS[0], str(bad)), tokens(engine, PROMPTS[0], folders[0]), return_exceptions=True)

    error, answer = asyncio.run(both())
    assert isinstance(error, AdapterError)
    assert "layers.9" in str(error)
    assert answer == expected[folders[0]][0]
    engine.check()


def test_an_engine_that_cannot_compute_says_so(tiny_model):
    engine = TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig())
    for _ in range(3):
        with pytest.raises(IndexError):
            asyncio.run(tokens(engine, [10**6]))
    with pytest.raises(RuntimeError):
        engine.check()
    engine.close()
    assert not any(t.name == "decode" and t is engine._thread for t in threading.enumerate())
