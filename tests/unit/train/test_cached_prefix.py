"""Rows behind one cached prefix: transformers' own tokens, without a copy of the prefix, or the ordinary way."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache

from pi_ray.train import cached_prefix, generation
from pi_ray.train.cached_prefix import CachedPrefix, cached_prefix_attention, shares_cached_prefix
from pi_ray.train.generation import compute_prefix_cache, generate_greedy, label_logprobs
from tests.generated import generate_alone, label_logprobs_alone

PREFIX = list(range(50, 70))
ROWS = [[5, 6, 7], [20, 21, 22, 23, 24], [9]]
SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}


def random_model(family, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **settings})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def expected_of(model):
    """What transformers generates for each row alone."""
    return generate_alone(model, PREFIX, ROWS, 6)


@pytest.fixture
def copies(monkeypatch):
    """The sizes of batches for which a prefix's cache was copied."""
    made, select = [], generation._select_rows

    def noted(cache, index):
        if not index.any():  # the one row of the prefix, so many times
            made.append(len(index))
        select(cache, index)

    monkeypatch.setattr(generation, "_select_rows", noted)
    return made


def test_scores_in_the_hundreds_keep_their_fractions_in_half_precision():
    """As a first token's are in real models; of numbers above 256, bfloat16 knows every second one."""
    torch.manual_seed(0)
    rows, heads, groups, depth, cached, own = 3, 6, 2, 32, 12, 4
    query, key, value = (torch.randn(rows, h, n, depth) for h, n in ((heads, 1), (groups, own), (groups, own)))
    far_key, far_value = (torch.randn(1, groups, cached, depth) for _ in range(2))
    query[..., 0], far_key[:, :, :3, 0], key[:, :, -1, 0] = 40.0, 40.0, 40.0
    query, key, value, far_key, far_value = (x.bfloat16() for x in (query, key, value, far_key, far_value))
    shared = CachedPrefix([(far_key, far_value)], torch.ones(rows, 1, own, dtype=torch.bool))
    output, _ = cached_prefix_attention(SimpleNamespace(layer_idx=0), query, key, value, None, cached_prefix=shared)
    keys, values = (
        torch.cat([far.float().expand(rows, -1, -1, -1), near.float()], 2)
        for far, near in ((far_key, key), (far_value, value))
    )
    expected = F.scaled_dot_product_attention(query.float(), keys, values, enable_gqa=True).transpose(1, 2)
    assert output.dtype == torch.bfloat16
    assert ((output.float() - expected).norm() / expected.norm()).item() < 0.01


@pytest.mark.parametrize("family, settings", [
    ("Llama", {}),
    ("Llama", {"num_key_value_heads": 4}),
    ("Qwen3", {"head_dim": 8}),
    ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
])  # fmt: skip
def test_full_attention_reads_one_copy_of_the_prefix_and_answers_as_transformers_does(family, settings, copies):
    model = random_model(family, **settings)
    cache = compute_prefix_cache(model, PREFIX)
    assert generate_greedy(model, PREFIX, ROWS, 6, None, cache) == expected_of(model)
    assert not copies and cache.get_seq_length() == len(PREFIX)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family, settings", [
    ("Mistral", {"sliding_window": 8}),
    ("Gemma2", {"head_dim": 8, "sliding_window": 8}),
    ("Qwen3Next", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}),
])  # fmt: skip
def test_where_a_layer_does_not_see_all_tokens_rows_of_equal_length_are_answered_together(family, settings, copies):
    model = random_model(family, **settings)
    assert generate_greedy(model, PREFIX, ROWS, 6, None) == expected_of(model)
    rows = [(row, [8, 4]) for row in ROWS]
    together = label_logprobs(model, PREFIX, rows, compute_prefix_cache(model, PREFIX))
    for (prompt, label), (logprobs, _) in zip(rows, together, strict=True):
        assert torch.allclose(logprobs, label_logprobs_alone(model, PREFIX, prompt, label)[0], atol=1e-4)


def test_soft_capped_scores_get_a_copy_of_the_prefix_for_each_row(copies):
    model = random_model("Gemma2", head_dim=8, sliding_window=64)
    assert generate_greedy(model, PREFIX, ROWS, 6, None) == expected_of(model) and 3 in copies


def test_a_cache_of_compressed_keys_is_found_out_and_copied(copies):
    model = random_model(
        "DeepseekV3", kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=1,
    )
    assert generate_greedy(model, PREFIX, ROWS, 6, None) == expected_of(model) and copies == [3]


def test_scores_with_something_more_are_copied_too(copies, monkeypatch):
    model = random_model("Llama")
    own = cached_prefix.cached_prefix_attention
    with_sinks = lambda *args, **kwargs: own(*args, **kwargs, s_aux=torch.zeros(4))  # noqa: E731
    monkeypatch.setitem(cached_prefix.AttentionInterface._global_mapping, cached_prefix.NAME, with_sinks)
    assert generate_greedy(model, PREFIX, ROWS, 6, None) == expected_of(model) and copies == [3]


def test_a_model_that_computes_something_else_in_this_way_is_found_out_once(copies, monkeypatch):
    model, tried = random_model("Llama"), []
    own = cached_prefix.cached_prefix_attention

    def wrong(*args, **kwargs):
        tried.append(1)
        return own(*args, **{**kwargs, "scaling": 9.0})

    monkeypatch.setitem(cached_prefix.AttentionInterface._global_mapping, cached_prefix.NAME, wrong)
    expected = expected_of(model)
    assert generate_greedy(model, PREFIX, ROWS, 6, None) == expected and copies == [3]
    seen = len(tried)
    assert generate_greedy(model, PREFIX, ROWS, 6, None) == expected and len(tried) == seen > 0


def test_an_empty_cache_is_not_shared():
    model = random_model("Llama")
    assert not shares_cached_prefix(model, DynamicCache()) and shares_cached_prefix(
        model, compute_prefix_cache(model, PREFIX)
    )


def test_log_probabilities_of_labels_are_those_of_an_ordinary_pass(copies):
    model, labels = random_model("Llama"), [[8, 4], [3, 9, 7], [6]]
    rows = list(zip(ROWS, labels, strict=True))
    found = label_logprobs(model, PREFIX, rows, compute_prefix_cache(model, PREFIX))
    for (prompt, label), (logprobs, likeliest) in zip(rows, found, strict=True):
        expected, best = label_logprobs_alone(model, PREFIX, prompt, label)
        assert torch.allclose(logprobs, expected, atol=1e-4) and likeliest.tolist() == best
    assert not copies
