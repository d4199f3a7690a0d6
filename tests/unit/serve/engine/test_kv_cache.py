"""Rows of any length in one batch compute what they compute alone, in models of several families."""

import pytest
import torch
import transformers

from pi_ray.errors import ModelError
from pi_ray.models import cache_argument
from pi_ray.serve.engine.cache_choice import create_kv_cache
from pi_ray.serve.engine.hybrid_cache import HybridKVCache
from pi_ray.serve.engine.kv_cache import KVCache
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.serve.engine.multi_lora_layer import BASE_SLOT
from pi_ray.serve.engine.unbatched_cache import UnbatchedCache

SIZES = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 6
BATCHED = [
    ("Llama", {}), ("Mixtral", {"num_local_experts": 4}), ("Qwen3", {"head_dim": 8}),
    ("Mistral", {"sliding_window": WINDOW}),
    ("Gemma2", {"head_dim": 8, "sliding_window": WINDOW}),
    ("Gemma4", {"head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW, "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"]}),
    ("GptOss", {"sliding_window": WINDOW, "num_local_experts": 4, "head_dim": 8}),
    ("Llama4", {
        "attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"], "head_dim": 8,
        "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2,
    }),
]  # fmt: skip
HYBRID = [
    ("Qwen3Next", {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]}),
    ("FalconH1", {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}),
    ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
]
UNBATCHED = [
    ("Bloom", {"n_layer": 2, "n_head": 4}), ("Mamba", {"state_size": 4}),
]
PROMPTS = [list(range(20, 42)), [7, 8, 9], list(range(100, 113))]
STEPS = 10


def tiny(family, settings):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = kind(**{**SIZES, **settings})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@torch.inference_mode()
def alone(model, prompt):
    """Logits after the prompt and after each of STEPS greedy tokens, without any cache."""
    ids, found = list(prompt), []
    for _ in range(STEPS):
        found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(found[-1].argmax()))
    return torch.stack(found)


@torch.inference_mode()
def together(model, cache):
    """The same with `cache`: the first prompt begins, the second joins after 3 steps, the third after 5; the first is
    read in pieces where it may be.
    """
    found, order = {0: [], 1: [], 2: []}, []

    def note(first, logits):
        for i, row in enumerate(logits):
            found[order[first + i]].append(row)

    def step():
        live = [i for i in order if len(found[i]) < STEPS]
        note(0, cache.forward(0, [[int(found[i][-1].argmax())] for i in order], [BASE_SLOT] * len(order)))
        return live

    cache.add_rows(1)
    order.append(0)
    if cache.chunked_prefill:
        cache.forward(0, [PROMPTS[0][:9]], [BASE_SLOT])
    note(0, cache.forward(0, [PROMPTS[0][cache.lengths[0] :]], [BASE_SLOT]))
    for joining, steps in ((1, 3), (2, 2)):
        for _ in range(steps):
            step()
        cache.add_rows(1)
        order.append(joining)
        note(len(order) - 1, cache.forward(len(order) - 1, [PROMPTS[joining]], [BASE_SLOT]))
    while order:
        for place in reversed([p for p, i in enumerate(order) if len(found[i]) >= STEPS]):
            cache.move_row(len(order) - 1, place)
            order[place] = order[-1]
            order.pop()
            cache.pop_row()
        if order:
            step()
    return [torch.stack(found[i][:STEPS]) for i in range(3)]


@pytest.mark.parametrize("family, settings", [*BATCHED, *HYBRID], ids=[f for f, _ in (*BATCHED, *HYBRID)])
def test_rows_that_join_and_leave_the_batch_have_the_logits_that_they_have_alone(family, settings):
    model = tiny(family, settings)
    cache = create_kv_cache(model, MultiLora(model, 1))
    assert isinstance(cache, HybridKVCache if (family, settings) in HYBRID else KVCache)
    for found, prompt in zip(together(model, cache), PROMPTS, strict=True):
        torch.testing.assert_close(found, alone(model, prompt), atol=1e-4, rtol=1e-4)
    assert cache.nbytes == 0, "no memory without rows"


@pytest.mark.parametrize("family, settings", UNBATCHED, ids=[f for f, _ in UNBATCHED])
def test_a_model_with_other_state_or_position_codes_gets_an_unbatched_cache(family, settings, caplog):
    model = tiny(family, settings)
    cache = create_kv_cache(model, MultiLora(model, 1))
    assert isinstance(cache, UnbatchedCache) and "cannot be batched token by token" in caplog.text
    for found, prompt in zip(together(model, cache), PROMPTS, strict=True):
        torch.testing.assert_close(found, alone(model, prompt), atol=1e-4, rtol=1e-4)


def test_a_model_that_does_not_go_on_from_a_cache_is_refused():
    """transformers' RWKV takes its state in an argument of its own; every token would be answered without the others.
    """
    model = tiny("Rwkv", {"attention_hidden_size": 32})
    with pytest.raises(ModelError, match="RwkvForCausalLM cannot be served: with its cache it computes something else"):
        create_kv_cache(model, MultiLora(model, 1))


@pytest.fixture
def kv_cache():
    model = tiny("Llama", {})
    return create_kv_cache(model, MultiLora(model, 1))


@torch.inference_mode()
def test_prompts_of_unequal_length_are_read_in_one_pass(kv_cache):
    kv_cache.add_rows(3)
    # the last tokens, side by side: of a view torch would multiply each row with a copy of the output layer
    together = []
    kv_cache.model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: together.append(inputs[0].is_contiguous())
    )
    logits = kv_cache.forward(0, PROMPTS, [BASE_SLOT] * 3)
    assert kv_cache.lengths == [len(p) for p in PROMPTS] and together == [True]
    for row, prompt in zip(logits, PROMPTS, strict=True):
        torch.testing.assert_close(row, alone(kv_cache.model, prompt)[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_row_can_begin_with_blocks_copied_from_another(kv_cache):
    kv_cache.add_rows(1)
    kv_cache.forward(0, [PROMPTS[0]], [BASE_SLOT])
    blocks = [kv_cache.copy_block(0, 0, 8), kv_cache.copy_block(0, 8, 16)]
    kv_cache.add_rows(2)
    kv_cache.load_blocks(2, blocks)
    logits = kv_cache.forward(1, [PROMPTS[1], PROMPTS[0][16:]], [BASE_SLOT] * 2)
    torch.testing.assert_close(logits[1], alone(kv_cache.model, PROMPTS[0])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[0], alone(kv_cache.model, PROMPTS[1])[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_compacted_cache_is_smaller_and_its_rows_go_on(kv_cache):
    kv_cache.planned = 300
    kv_cache.add_rows(3)
    kv_cache.forward(0, [list(range(150)), PROMPTS[1], PROMPTS[2]], [BASE_SLOT] * 3)
    kv_cache.move_row(2, 0)
    kv_cache.pop_row()
    kv_cache.planned, before = 30, kv_cache.nbytes
    expected = kv_cache.bytes_for(2, 30, True)
    kv_cache.compact()
    assert kv_cache.nbytes == expected == before // 6, "2 rows of 4, 64 positions of 192"
    logits = kv_cache.forward(0, [[3], [3]], [BASE_SLOT] * 2)
    for row, prompt in zip(logits, (PROMPTS[2], PROMPTS[1]), strict=True):
        torch.testing.assert_close(row, alone(kv_cache.model, [*prompt, 3])[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_infinite_keys_of_a_dropped_row_do_not_reach_the_next_sequence_in_it(kv_cache):
    """Keys of a hostile adapter may be so large that even a masked one would make NaN."""
    kv_cache.add_rows(3)
    kv_cache.forward(0, [PROMPTS[0], PROMPTS[2], PROMPTS[0]], [BASE_SLOT] * 3)
    for store in kv_cache.stores:
        store[:, [0, 2]] = torch.inf
    kv_cache.pop_row()
    kv_cache.move_row(1, 0)
    kv_cache.pop_row()
    kv_cache.add_rows(1)
    kv_cache.forward(1, [PROMPTS[1]], [BASE_SLOT])
    logits = kv_cache.forward(0, [[3], [3]], [BASE_SLOT] * 2)
    for row, prompt in zip(logits, (PROMPTS[2], PROMPTS[1]), strict=True):
        torch.testing.assert_close(row, alone(kv_cache.model, [*prompt, 3])[0], atol=1e-5, rtol=1e-4)


def test_the_argument_for_the_cache_has_the_name_that_the_model_knows(kv_cache):
    assert cache_argument(type(kv_cache.model)) in ("cache", "past_key_values")
    old = type("Old", (), {"forward": lambda self, input_ids, past_key_values=None: None})
    assert cache_argument(old) == "past_key_values"


@torch.inference_mode()
def test_a_hybrids_states_are_counted_and_freed_and_no_block_is_loaded_without_them():
    model = tiny(*HYBRID[0])
    cache = create_kv_cache(model, MultiLora(model, 1))
    assert cache.needs_states and cache.nbytes == 0
    cache.planned = 64
    expected = cache.bytes_for(4, 64)
    cache.add_rows(3)
    cache.forward(0, PROMPTS, [BASE_SLOT] * 3)
    assert cache.nbytes == expected > 0
    with pytest.raises(ValueError, match="states"):
        cache.load_blocks(0, [cache.copy_block(0, 0, 8)])
    first = cache.forward(0, [[5], [6], [7]], [BASE_SLOT] * 3)[0]
    for _ in range(2):
        cache.pop_row()
    cache.compact()
    assert cache.nbytes < expected and torch.isfinite(first).all()
    cache.pop_row()
    assert cache.nbytes == 0
