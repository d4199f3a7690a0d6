"""The transformers engine: the same tokens as transformers' own generate, one adapter per answer, slots that come
back.
"""

import asyncio
import json
import shutil
import struct
import threading
from types import SimpleNamespace

import pytest
import torch

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.errors import AdapterError, ModelError
from pi_ray.protocols import GenerationRequest
from pi_ray.serve.engine.engine import TransformersEngine
from pi_ray.serve.engine.refusal import RefusedError
from pi_ray.store.adapters import AdapterStore, StoreUnavailableError
from tests.conftest import tiny
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
        return [
            model.generate(torch.tensor([p]), max_new_tokens=LENGTH, do_sample=False)[0, len(p) :].tolist()
            for p in PROMPTS
        ]

    return {"": greedy(AutoModelForCausalLM.from_pretrained(tiny_model))} | {
        folder: greedy(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder))
        for folder in folders
    }


async def collect(engine, request):
    return [token.id async for token in engine.generate(request)]


async def tokens(engine, prompt, adapter="", **options):
    return await collect(engine, GenerationRequest(prompt, **{"max_new_tokens": LENGTH, **options}, adapter=adapter))


@pytest.fixture
def fresh(tiny_model):
    """Engines with settings of their own, closed after the test."""
    made = []

    def build(**settings):
        made.append(TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig(**settings)))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def open_requests(engine):
    stats = engine.stats()
    return stats["active"] + stats["waiting"]


async def drained(engine):
    for _ in range(3000):
        if not open_requests(engine):
            return True
        await asyncio.sleep(0.01)
    return False


def test_greedy_tokens_equal_transformers_generate_alone_and_in_a_batch(engine, expected):
    async def all_at_once():
        return await asyncio.gather(*(tokens(engine, p) for p in PROMPTS))

    assert asyncio.run(tokens(engine, PROMPTS[0])) == expected[""][0]
    assert asyncio.run(all_at_once()) == expected[""]


def test_the_expected_answers_differ_between_adapters(expected):
    assert len({json.dumps(answer) for answer in expected.values()}) == len(expected)


def test_concurrent_requests_for_more_adapters_than_slots_are_answered_by_their_own(engine, expected, folders):
    jobs = [(folder, i) for _ in range(3) for folder in ["", *folders] for i in range(len(PROMPTS))]

    async def burst():
        return await asyncio.gather(*(tokens(engine, PROMPTS[i], folder) for folder, i in jobs))

    assert asyncio.run(burst()) == [expected[folder][i] for folder, i in jobs]
    assert len(engine._scheduler.multi_lora) == 2
    assert asyncio.run(drained(engine))


def test_a_single_slot_serves_adapters_in_turn(fresh, expected, folders):
    engine = fresh(max_loras=1)
    for folder in [*folders[:2], "", *folders[:2]]:
        assert asyncio.run(tokens(engine, PROMPTS[1], folder)) == expected[folder][1]


def test_a_request_joins_the_running_batch_and_leaves_before_one_that_came_first(engine, expected, folders):
    async def overtake():
        long = engine.generate(GenerationRequest(PROMPTS[2], 100_000, folders[1]))
        for _ in range(3):
            await anext(long)
        before = engine.stats()["generated_tokens"]
        short = await tokens(engine, PROMPTS[0], folders[0])
        assert engine.stats()["active"] == 1
        await long.aclose()
        return short, engine.stats()["generated_tokens"] - before

    answer, steps = asyncio.run(overtake())
    assert answer == expected[folders[0]][0]
    assert steps >= 2 * LENGTH - 2, "the long one went on meanwhile"


@pytest.mark.parametrize(
    "settings", [{"prefill_tokens": 16}, {"prefill_tokens": 1}, {"max_ongoing_requests": 1}], ids=str
)
def test_answers_do_not_depend_on_how_prompts_are_cut_or_how_many_go_together(fresh, expected, folders, settings):
    engine = fresh(**settings)
    jobs = [(folder, i) for folder in ["", *folders] for i in range(len(PROMPTS))]

    async def burst():
        return await asyncio.gather(*(tokens(engine, PROMPTS[i], folder) for folder, i in jobs))

    assert asyncio.run(burst()) == [expected[folder][i] for folder, i in jobs]


def test_running_answers_go_on_while_a_long_prompt_is_read(fresh):
    engine = fresh(prefill_tokens=8)

    async def watch():
        running = engine.generate(GenerationRequest(PROMPTS[0], 100_000))
        await anext(running)
        before = engine.stats()["generated_tokens"]
        joining = engine.generate(GenerationRequest(list(range(200, 360)), 1))
        await anext(joining)
        await running.aclose()
        return engine.stats()["generated_tokens"] - before

    assert asyncio.run(watch()) >= 160 / 8


def test_cached_prompt_blocks_are_not_read_again_and_change_no_token(fresh, folders):
    shared = list(range(300, 350))
    prompts = [[*shared, *own] for own in ([1, 2, 3], [4], [5] * 30, [])] * 2
    engine, without = fresh(), fresh(prefix_cache_mb=0)

    async def answers(engine):
        found = [await tokens(engine, p, folder, max_new_tokens=4) for folder in ("", folders[0]) for p in prompts]
        return found + await asyncio.gather(*(tokens(engine, p, folders[0], max_new_tokens=4) for p in prompts))

    assert asyncio.run(answers(engine)) == asyncio.run(answers(without))
    assert without.stats()["prefix_hit_tokens"] == 0 == without.stats()["prefix_cache_bytes"]
    again = sum((len(p) - 1) // 16 for p in prompts)  # of prompts that were read before; the last token is always read
    # the first prompt finds nothing, and the first with 30 fives the shared beginning alone
    first = again - (3 + 4 - 3)
    assert engine.stats()["prefix_hit_tokens"] == 16 * (2 * first + again)


@pytest.fixture(scope="module", params=[
    ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    ("Qwen3Next", {
        "num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
], ids=["convolution", "gated delta net"])  # fmt: skip
def hybrid(request, tmp_path_factory):
    family, settings = request.param
    return tiny(tmp_path_factory.mktemp(family), family, **settings)


def test_a_hybrids_states_are_cached_where_two_prompts_part_and_change_no_token(hybrid):
    shared = list(range(300, 340))
    prompts = [[*shared, *own] for own in ([1, 2, 3], [4], [5] * 30, [6] * 7, [5] * 30)]

    def engine(**settings):
        return TransformersEngine(ModelConfig(base=str(hybrid)), ServeConfig(**settings))

    async def answers(engine):
        found, hits = [], []
        for prompt in prompts:
            found.append(await tokens(engine, prompt, max_new_tokens=4))
            hits.append(engine.stats()["prefix_hit_tokens"] - sum(hits))
        return [*found, *await asyncio.gather(*(tokens(engine, p, max_new_tokens=4) for p in prompts))], hits

    cached, without, pieces = engine(), engine(prefix_cache_mb=0), engine(prefill_tokens=16)
    expected, none = asyncio.run(answers(without))
    assert none == [0] * 5 and without.stats()["prefix_cache_bytes"] == 0
    # the first leaves blocks, the second states where it parts, from which the others go on
    assert asyncio.run(answers(cached)) == (expected, [0, 0, 32, 32, 32])
    assert asyncio.run(answers(pieces))[0] == expected
    for each in (cached, without, pieces):
        each.close()


def test_mamba_is_answered_right_at_any_concurrency(tiny_model, tmp_path):
    """Mamba: a prompt must be read in one piece there, however small the budget is."""
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=0, bos_token_id=0
        )
    ).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(LENGTH):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    engine = TransformersEngine(ModelConfig(base=str(tmp_path)), ServeConfig(prefill_tokens=4))

    async def all_at_once():
        return await asyncio.gather(*(tokens(engine, p) for p in PROMPTS * 2))

    assert asyncio.run(all_at_once()) == expected * 2
    assert engine.stats()["prefix_hit_tokens"] == 0
    engine.close()


def test_a_request_whose_adapter_has_no_slot_gets_one_though_others_keep_the_slots_busy(fresh, folders, expected):
    """Two adapters hold the only two places, one after the other without a pause; the third gets in all the same."""
    engine = fresh(max_loras=2, max_ongoing_requests=4)

    async def crowd():
        stop = asyncio.Event()

        async def again(folder):
            while not stop.is_set():
                await tokens(engine, PROMPTS[1], folder)

        busy = [asyncio.create_task(again(folder)) for folder in folders[:2] * 2]
        await asyncio.sleep(0.05)
        answer = await asyncio.wait_for(tokens(engine, PROMPTS[1], folders[2]), 30)
        stop.set()
        await asyncio.gather(*busy)
        return answer

    assert asyncio.run(crowd()) == expected[folders[2]][1]


def test_adapters_that_do_not_fit_into_memory_together_are_answered_in_turn(fresh, folders, expected):
    engine = fresh(max_loras=4)
    asyncio.run(tokens(engine, PROMPTS[1], folders[0]))
    engine._scheduler.multi_lora.max_bytes = engine.stats()["adapter_bytes"]

    jobs = [*folders[:3], "", *folders[:3]]

    async def burst():
        return await asyncio.gather(*(tokens(engine, PROMPTS[1], folder) for folder in jobs))

    assert asyncio.run(burst()) == [expected[folder][1] for folder in jobs]
    assert engine.stats()["adapter_bytes"] <= engine._scheduler.multi_lora.max_bytes


def test_requests_wait_for_kv_cache_memory_and_one_that_is_too_large_alone_is_refused(fresh, expected):
    engine = fresh(max_ongoing_requests=4)
    scheduler = engine._scheduler
    scheduler.kv_cache_limit = scheduler.kv_cache.bytes_for(2, 64)
    sizes, rows = [], []
    reserve = scheduler.kv_cache._reserve

    def watched(*shape):
        reserve(*shape)
        sizes.append(scheduler.kv_cache.nbytes)
        rows.append(scheduler.kv_cache.reserved[0])

    scheduler.kv_cache._reserve = watched

    async def burst():
        jobs = [tokens(engine, PROMPTS[i % 3]) for i in range(6)]
        large = tokens(engine, PROMPTS[0], max_new_tokens=500)
        return await asyncio.gather(*jobs, large, return_exceptions=True)

    *answers, error = asyncio.run(burst())
    assert answers == expected[""] * 2
    assert max(sizes) <= scheduler.kv_cache_limit and max(rows) == 2
    assert isinstance(error, RefusedError) and (error.status, error.param) == (400, "max_tokens")
    assert "510 tokens of prompt and answer need" in str(error) and "serve.kv_cache_mb" in str(error)


def test_the_kv_cache_reserves_no_more_than_was_admitted(fresh):
    engine = fresh()
    cache, peak = engine._scheduler.kv_cache, []
    reserve = cache._reserve
    cache._reserve = lambda *shape: (reserve(*shape), peak.append(cache.nbytes))

    async def both():
        await asyncio.gather(*(tokens(engine, list(range(n)), max_new_tokens=200) for n in (5, 90, 300)))

    planned = cache.bytes_for(3, 500)
    asyncio.run(both())
    assert 0 < max(peak) <= planned


def test_memory_of_a_long_sequence_is_free_for_others_once_it_has_left(fresh):
    engine = fresh(max_ongoing_requests=8)
    scheduler = engine._scheduler
    scheduler.kv_cache_limit = scheduler.kv_cache.bytes_for(4, 320)

    async def use():
        first = engine.generate(GenerationRequest(PROMPTS[0], 110))
        await asyncio.gather(anext(first), tokens(engine, list(range(2, 300)), max_new_tokens=2))
        rows = []

        async def watch():
            async for _ in first:
                rows.append(len(scheduler.running))

        short = [tokens(engine, PROMPTS[1], max_new_tokens=40) for _ in range(5)]
        await asyncio.gather(watch(), *short)
        return max(rows)

    assert asyncio.run(use()) == 6
    assert scheduler.kv_cache.planned == 0


def test_a_prompt_with_a_cached_part_and_a_longer_one_reserve_no_more_than_was_planned(fresh):
    engine = fresh()
    cache, peak = engine._scheduler.kv_cache, []
    long = [list(range(3 + i, 163 + i)) for i in range(2)]
    asyncio.run(tokens(engine, long[0], max_new_tokens=1))
    reserve = cache._reserve
    cache._reserve = lambda *shape: (reserve(*shape), peak.append(cache.reserved[1]))

    async def both():
        await asyncio.gather(*(tokens(engine, prompt, max_new_tokens=1) for prompt in long))

    asyncio.run(both())
    assert engine.stats()["prefix_hit_tokens"] and max(peak) == 192


def test_a_merged_adapter_answers_as_it_does_beside_the_base_and_no_other_is_served(fresh, expected, folders):
    engine = fresh()
    engine.merge(folders[0])
    assert asyncio.run(tokens(engine, PROMPTS[0], folders[0])) == expected[folders[0]][0]
    for other in (folders[1], ""):
        with pytest.raises(AdapterError, match=r"merged into the base model \(serve.merge\) and serves it alone"):
            asyncio.run(tokens(engine, PROMPTS[0], other))


def test_log_probabilities_equal_those_of_transformers_and_come_only_when_asked_for(engine, tiny_model):
    from transformers import AutoModelForCausalLM

    async def both():
        async def all_of(**options):
            return [t async for t in engine.generate(GenerationRequest(PROMPTS[1], 3, **options))]

        return await asyncio.gather(all_of(logprobs=2), all_of())

    told, plain = asyncio.run(both())
    with torch.no_grad():
        ids = torch.tensor([[*PROMPTS[1], *(t.id for t in told)]])
        logprobs = (
            AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=ids)
            .logits[0]
            .log_softmax(-1)[len(PROMPTS[1]) - 1 : -1]
        )
    for token, row in zip(told, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4) and token.top[0] == (
            token.id, token.logprob,
        )
        assert [i for i, _ in token.top] == row.topk(2).indices.tolist()
    assert [t.id for t in plain] == [t.id for t in told] and all(t.logprob is None and t.top == () for t in plain)


def small_copies(folder, target, n):
    """Adapters that each change a single layer in their own way."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: t
        for name, t in load_file(f"{folder}/adapter_model.safetensors").items()
        if "layers.1.mlp.down_proj" in name
    }
    for i in range(n):
        (target / str(i)).mkdir(parents=True)
        shutil.copy(f"{folder}/adapter_config.json", target / str(i))
        torch.manual_seed(i)
        save_file(
            {name: torch.randn_like(t) for name, t in tensors.items()}, target / str(i) / "adapter_model.safetensors"
        )
    return [str(target / str(i)) for i in range(n)]


@pytest.mark.fault
def test_fifty_adapters_in_four_slots_give_each_request_its_own_answer(fresh, folders, tmp_path):
    many = small_copies(folders[0], tmp_path, 50)
    engine = fresh(max_loras=4)

    async def burst():
        return await asyncio.gather(*(tokens(engine, PROMPTS[1], folder, max_new_tokens=4) for folder in many * 2))

    found = asyncio.run(burst())
    stats = engine.stats()
    alone = fresh(max_loras=1, prefix_cache_mb=0)
    expected = [asyncio.run(tokens(alone, PROMPTS[1], folder, max_new_tokens=4)) for folder in many]
    assert found == expected * 2
    assert len({json.dumps(answer) for answer in expected}) > 40, "the answers tell the adapters apart"
    assert stats["adapters"] == 4 and stats["adapter_evictions"] >= 46


def test_closing_the_iterator_frees_the_slot(engine):
    async def leave():
        stream = engine.generate(GenerationRequest(PROMPTS[0], 100_000))
        await anext(stream)
        assert open_requests(engine) == 1
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


def test_a_seed_gives_the_same_tokens_in_any_batch(engine):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}

    async def together():
        return (
            await asyncio.gather(
                tokens(engine, PROMPTS[0], **options), tokens(engine, PROMPTS[2]),
                tokens(engine, PROMPTS[1], temperature=1.0),
            )
        )[0]

    alone = asyncio.run(tokens(engine, PROMPTS[0], **options))
    assert asyncio.run(together()) == alone
    assert asyncio.run(tokens(engine, PROMPTS[0], **{**options, "seed": 8})) != alone


@pytest.mark.fault
def test_a_cached_prefix_is_found_only_by_requests_of_the_same_salt(fresh):
    engine, prompt, hits = fresh(), list(range(300, 350)), []
    for salt in ("one", "two", "one", ""):
        asyncio.run(collect(engine, GenerationRequest(prompt, 1, cache_salt=salt)))
        hits.append(engine.stats()["prefix_hit_tokens"])
    assert hits == [0, 0, 48, 48]


def test_a_version_replaced_in_place_is_answered_with_its_new_weights(fresh, tiny_model, tmp_path):
    """By the stacks, and by the prefix cache, which keeps keys and values that the old weights made."""
    prompt = list(range(300, 350))
    engine, store = fresh(max_loras=2), AdapterStore(tmp_path)

    def answer(engine):
        adapter = store.open("colours")
        request = GenerationRequest(prompt, LENGTH, str(adapter.path), adapter_hash=adapter.hash)
        return asyncio.run(collect(engine, request))

    put_in_store(tmp_path, "colours", tiny_model, seed=1)
    old = answer(engine)
    put_in_store(tmp_path, "colours", tiny_model, seed=2)
    new = answer(engine)
    assert old != new == answer(fresh(max_loras=2, prefix_cache_mb=0))


def test_an_adapter_replaced_between_verification_and_loading_is_not_loaded(engine, tiny_model, tmp_path):
    put_in_store(tmp_path, "colours", tiny_model, seed=1)
    adapter = AdapterStore(tmp_path).open("colours")
    put_in_store(tmp_path, "colours", tiny_model, seed=2)
    with pytest.raises(StoreUnavailableError, match="replaced"):
        asyncio.run(collect(engine, GenerationRequest(PROMPTS[0], 1, str(adapter.path), adapter_hash=adapter.hash)))


def test_end_of_sequence_and_stop_strings_end_an_answer(engine, expected):
    stop = engine.tokenizer.decode(expected[""][0][:4])[-3:]
    got = asyncio.run(tokens(engine, PROMPTS[0], stop=(stop,)))
    assert got == expected[""][0][: len(got)]
    assert len(got) <= 4
    engine._scheduler.eos_ids.add(expected[""][0][5])
    got = asyncio.run(tokens(engine, PROMPTS[0]))
    engine._scheduler.eos_ids.discard(expected[""][0][5])
    assert got == expected[""][0][: expected[""][0].index(expected[""][0][5]) + 1]


def test_an_adapter_that_does_not_fit_the_base_fails_its_own_request_alone(
    engine, expected, folders, tiny_model, tmp_path
):
    bad = put_in_store(tmp_path, "bad", tiny_model)
    data = (bad / "adapter_model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(b"layers.1", b"layers.9")
    rewrite(bad, "adapter_model.safetensors", data[:8] + header + data[8 + length :])

    async def both():
        return await asyncio.gather(
            tokens(engine, PROMPTS[0], str(bad)), tokens(engine, PROMPTS[0], folders[0]), return_exceptions=True
        )

    error, answer = asyncio.run(both())
    assert isinstance(error, AdapterError)
    assert "layers.9" in str(error)
    assert answer == expected[folders[0]][0]
    engine.check()


def test_a_prompt_that_cannot_be_read_fails_alone_though_others_were_read_with_it(fresh, expected):
    engine = fresh()

    async def three():
        wrong = tokens(engine, [10**6, 3])
        return await asyncio.gather(
            tokens(engine, PROMPTS[0]), wrong, tokens(engine, PROMPTS[2]), return_exceptions=True
        )

    first, error, last = asyncio.run(three())
    assert isinstance(error, IndexError)
    assert [first, last] == [expected[""][0], expected[""][2]]
    engine.check()
    assert asyncio.run(drained(engine))


@pytest.mark.fault
def test_an_adapter_that_computes_nan_fails_its_own_requests_alone(fresh, expected, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    wild = small_copies(folders[0], tmp_path, 1)[0]
    save_file(
        {name: t * 1e30 for name, t in load_file(f"{wild}/adapter_model.safetensors").items()},
        f"{wild}/adapter_model.safetensors",
    )
    engine = fresh(max_ongoing_requests=3)

    async def mixed():
        jobs = [
            tokens(engine, PROMPTS[i % 3], folder)
            for i, folder in enumerate([wild, folders[0], "", wild, folders[1], ""])
        ]
        return await asyncio.gather(*jobs, return_exceptions=True)

    found = asyncio.run(mixed())
    assert all(isinstance(found[i], RuntimeError) and "not a number" in str(found[i]) for i in (0, 3))
    assert [found[i] for i in (1, 2, 4, 5)] == [
        expected[folders[0]][1], expected[""][2], expected[folders[1]][1], expected[""][2],
    ]
    engine.check()


def test_one_thread_alone_loads_merges_and_decodes(fresh, folders, monkeypatch):
    """A second one that computes would double the time of a step (see engine.py)."""
    seen = set()
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *a: seen.add(threading.current_thread().name) or forward(*a))
    # packed layers have another forward
    monkeypatch.setattr(
        "pi_ray.serve.engine.scheduler.use_onednn_linears", lambda base: seen.add(threading.current_thread().name)
    )
    engine = fresh()
    engine.merge(folders[0])
    asyncio.run(tokens(engine, PROMPTS[0], folders[0]))
    assert seen == {"decode_0"}


def test_errors_of_the_decoding_thread_are_raised_in_the_calling_thread(fresh, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError):
        fresh().merge(str(tmp_path))
    with pytest.raises(ModelError, match="no such folder"):
        TransformersEngine(ModelConfig(base=str(tmp_path / "none")), ServeConfig())
    engine = fresh()
    engine.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        engine.merge("")


def test_bad_requests_in_a_row_are_no_fault_of_the_engine(engine, expected):
    for _ in range(4):
        with pytest.raises(IndexError):
            asyncio.run(tokens(engine, [10**6]))
    engine.check()
    assert asyncio.run(tokens(engine, PROMPTS[0])) == expected[""][0]


def test_a_step_that_does_not_end_is_noticed_and_an_idle_engine_is_healthy(fresh, monkeypatch):
    engine, clock = fresh(), SimpleNamespace(now=0.0)
    monkeypatch.setattr("pi_ray.serve.engine.engine.time", SimpleNamespace(monotonic=lambda: clock.now))
    hang, reached = threading.Event(), threading.Event()

    def step():
        reached.set()
        assert hang.wait(30)
        return []

    monkeypatch.setattr(engine._scheduler, "step", step)

    async def hung():
        stream = asyncio.ensure_future(anext(engine.generate(GenerationRequest(PROMPTS[0], 1))))
        await asyncio.to_thread(reached.wait, 30)
        clock.now += 299
        engine.check()
        clock.now += 2
        try:
            with pytest.raises(RuntimeError, match=r"more than 300 s \(serve.step_timeout_s\)"):
                engine.check()
        finally:
            monkeypatch.undo()
            stream.cancel()
            hang.set()

    engine.check()
    asyncio.run(hung())


def test_check_raises_after_three_faults_of_the_engine_and_close_ends_the_thread(tiny_model, monkeypatch):
    engine = TransformersEngine(ModelConfig(base=str(tiny_model)), ServeConfig())
    monkeypatch.setattr(engine._scheduler.kv_cache, "forward", lambda *arguments: 1 / 0)
    for _ in range(3):
        engine.check()
        with pytest.raises(ZeroDivisionError):
            asyncio.run(tokens(engine, PROMPTS[0]))
    with pytest.raises(RuntimeError, match="no longer generates"):
        engine.check()
    threads = engine._thread._threads
    engine.close()
    assert len(threads) == 1 and not any(t.is_alive() for t in threads)


def test_a_bug_in_a_step_is_logged_and_ends_every_request_with_an_error(fresh, monkeypatch, caplog):
    engine = fresh()
    monkeypatch.setattr(engine._scheduler, "admit", lambda waiting: 1 / 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the engine was closed"):
            asyncio.run(tokens(engine, PROMPTS[0]))
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(RuntimeError, match="no longer generates"):
        engine.check()
