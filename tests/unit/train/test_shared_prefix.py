"""Shared-prefix batches: the same losses and gradients as plain batches, from fewer tokens."""

from types import SimpleNamespace

import pytest
import torch

from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.errors import TrainingError
from pi_ray.models import load_model
from pi_ray.train import lora, shared_prefix
from pi_ray.train.batch_logits import packing_error
from pi_ray.train.batches import packed_batch, plain_batch
from pi_ray.train.objectives import sft_loss

ROWS = [([5, 6, 7, 8], [9, 10]), ([11, 12], [13, 14, 15]), ([16] * 7, [17])]


@pytest.fixture(scope="module")
def model(tiny_model):
    model = lora.add_lora(load_model(ModelConfig(base=str(tiny_model))), LoraConfig(rank=4), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.train()


def gradients(model, batch):
    model.zero_grad()
    loss = sft_loss(model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in lora.trainable_parameters(model).values()])


@pytest.mark.parametrize("prefix", [[], [3], list(range(20, 60))], ids=["no prefix", "one token", "forty tokens"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_gradients_equal_those_of_plain_batches(model, prefix, checkpointing):
    model.set_attn_implementation("sdpa")
    loss, expected = gradients(model, plain_batch(prefix, ROWS))
    shared_prefix.enable_shared_prefix(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shared_loss, found = gradients(model, packed_batch(prefix, ROWS))
    model.gradient_checkpointing_disable()
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert (found - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("pack", [packed_batch, plain_batch])
def test_all_turns_of_a_conversation_are_learned_in_one_pass_as_each_by_itself(model, pack):
    model.set_attn_implementation("sdpa")
    prefix, asked, first, between, second = [3, 4, 5], [6, 7], [8, 9], [10, 11, 12], [13, 14]
    turns = [(asked, first), (asked + first + between, second)]
    whole = (asked, first + [~i for i in between] + second)
    if pack is packed_batch:
        shared_prefix.enable_shared_prefix(model)
    loss, found = gradients(model, pack(prefix, [whole, ROWS[0]]))
    expected_loss, expected = gradients(model, pack(prefix, [*turns, ROWS[0]]))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_only_learned_tokens_have_logits_in_packed_rows():
    batch = packed_batch([3], [([6, 7], [8, ~9, ~10, 11])])
    assert batch.inputs["input_ids"].tolist() == [[3, 6, 7, 8, 9, 10]]
    assert batch.inputs["logits_to_keep"].tolist() == [2, 5] and batch.labels.tolist() == [8, 11]


def test_a_row_does_not_see_its_neighbours(model):
    shared_prefix.enable_shared_prefix(model)
    alone = sft_loss(model, packed_batch([1, 2, 3], ROWS[:1])).item()
    together = [
        sft_loss(model, packed_batch([1, 2, 3], [ROWS[0], other])).item()
        - sft_loss(model, packed_batch([1, 2, 3], [other])).item()
        for other in ROWS[1:]
    ]
    assert together == pytest.approx([alone, alone], rel=1e-5)


def test_the_prefix_passes_through_the_model_once():
    batch = packed_batch(list(range(100)), ROWS)
    fed = sum(len(prompt) + len(label) - 1 for prompt, label in ROWS)
    assert batch.tokens == 100 + fed
    assert batch.plain_tokens == 300 + fed


def test_only_answer_tokens_are_labels():
    assert packed_batch([1], ROWS).labels.tolist() == [9, 10, 13, 14, 15, 17]
    assert sorted(n for n in plain_batch([1], ROWS).labels.tolist() if n != -100) == sorted([9, 10, 13, 14, 15, 17])


class Decoder(SimpleNamespace):
    def forward(self, input_ids, attention_mask=None):
        raise NotImplementedError


@pytest.mark.parametrize("config, reason", [
    ({"sliding_window": 99, "layer_types": ["full_attention", "sliding_attention"]}, ""),
    ({"sliding_window": 99, "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ({"sliding_window": 99, "use_sliding_window": False}, ""),
    ({}, ""),
])
def test_models_without_full_attention_say_why_they_get_plain_batches(config, reason):
    inner = SimpleNamespace(**config)
    model = Decoder(
        config=SimpleNamespace(get_text_config=lambda: inner), _can_set_attn_implementation=lambda: True
    )
    found = shared_prefix.why_prefix_cannot_be_shared(model)
    assert (reason in found) if reason else found == ""


def test_a_window_that_holds_the_longest_row_is_full_attention():
    windowed = SimpleNamespace(sliding_window=99)
    model = Decoder(config=SimpleNamespace(get_text_config=lambda: windowed))
    assert shared_prefix.why_not_all_is_seen(model, 99) == ""
    assert "sliding window of 99 tokens, and rows have up to 100" in shared_prefix.why_not_all_is_seen(model, 100)


@pytest.mark.parametrize("name, own", [
    ("Rwkv", {"num_hidden_layers": 2, "attention_hidden_size": 32}),
    ("xLSTM", {"num_hidden_layers": 2, "num_heads": 2}),
])
def test_layers_that_keep_a_state_in_place_of_what_they_saw_are_known(name, own):
    assert "keep a state in place of" in shared_prefix.why_not_all_is_seen(family(name, **own), 8)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize("family, own", [
    ("Mistral", {"sliding_window": None}), ("Mixtral", {"num_local_experts": 4}), ("Qwen2", {}),
    ("Qwen3", {"head_dim": 8}), ("Qwen3Moe", {"head_dim": 8, **MIXED}), ("Mistral", {"sliding_window": 6}),
    ("Gemma3", {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
])  # fmt: skip
def test_other_decoders_with_full_attention_take_them_too_with_gradient_checkpointing(family, own):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    base = getattr(transformers, f"{family}ForCausalLM")(config(**SMALL, **own)).eval()
    assert shared_prefix.why_prefix_cannot_be_shared(base) == ""
    model = lora.add_lora(base, LoraConfig(rank=4), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    loss, expected = gradients(model.train(), plain_batch(list(range(20, 40)), ROWS))
    shared_prefix.enable_shared_prefix(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shared_loss, found = gradients(model, packed_batch(list(range(20, 40)), ROWS))
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert (found - expected).norm() / expected.norm() < 1e-3


def family(name, **own):
    """A tiny random model, with weights large enough for a row that it should not see to show."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{"vocab_size": 64, "hidden_size": 32, "initializer_range": 0.2, **own})
    )


LAYERS = {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    "name, own",
    [
        ("Bloom", {"n_layer": 2, "n_head": 4}), ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
        ("Rwkv", {**LAYERS, "attention_hidden_size": 32}),
    ],
)
def test_an_attention_that_cannot_be_exchanged_gets_plain_batches_and_without_looking_rows_would_see_each_other(
    name, own
):
    model = family(name, **own)
    assert f"{name}ForCausalLM has an attention of its own" in shared_prefix.why_prefix_cannot_be_shared(model)
    before = model.config._attn_implementation
    assert "computes something else" in packing_error(model, "cpu", False)
    assert model.config._attn_implementation == before and model.training


def test_what_a_config_does_not_tell_is_found_by_computing():
    """gpt-oss has a learned sink in each layer, which shared-prefix attention leaves out; its window holds these
    rows.
    """
    sinks = family(
        "GptOss", **{**SMALL, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128}
    )
    assert shared_prefix.why_prefix_cannot_be_shared(sinks) == "" != packing_error(sinks, "cpu", False)
    llama = family("Llama", **SMALL)
    assert (
        packing_error(llama, "cpu", False) == ""
        and llama.config._attn_implementation == shared_prefix.NAME
        and llama.training
    )


def dense(prefix, visible, lengths, window=None):
    """(S, S): what each token of a packed row may see, place by place."""
    segment = [-1] * prefix + [row for row, n in enumerate(lengths) for _ in range(n)]
    position = [*range(prefix), *(prefix + i for n in lengths for i in range(n))]

    def sees(q, k):
        inside = segment[k] == segment[q] or prefix - visible <= k < prefix
        return k <= q and inside and (window is None or position[q] - position[k] < window)

    return torch.tensor([[sees(q, k) for k in range(len(segment))] for q in range(len(segment))])


LAYOUTS = [
    (0, 0, [3, 1, 5], None), (7, 7, [4, 6], None), (150, 3, [40, 90, 1], None), (7, 7, [4, 6], 5), (0, 0, [3, 9], 2),
    (150, 150, [40, 90, 1], 130), (9, 9, [2, 3], 1), (9, 9, [2, 3], 40),
]


@pytest.mark.parametrize("prefix, visible, lengths, window", LAYOUTS)
def test_flex_attentions_mask_is_the_layouts(prefix, visible, lengths, window):
    from torch.nn.attention.flex_attention import create_mask

    layout = shared_prefix.Layout.build(prefix, lengths, visible)
    size = prefix + sum(lengths)
    found = create_mask(layout.mask_mod(window), 1, 1, size, size, device="cpu")[0, 0]
    assert torch.equal(found, dense(prefix, visible, lengths, window))


@pytest.mark.parametrize("prefix, visible, lengths, window", LAYOUTS)
def test_both_kinds_of_attention_see_what_the_layout_says(prefix, visible, lengths, window):
    torch.manual_seed(0)
    layout = shared_prefix.Layout.build(prefix, lengths, visible)
    query, key, value = (torch.randn(1, heads, prefix + sum(lengths), 16) for heads in (4, 2, 2))
    sees = dense(prefix, visible, lengths, window)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, sees, scale=0.3, enable_gqa=True)
    for flex in (False, True):
        found = shared_prefix.shared_prefix_attention(
            None, query, key, value, None, scaling=0.3, layout=layout, flex=flex, sliding_window=window
        )[0]
        assert torch.allclose(found.transpose(1, 2), expected, atol=1e-5)
    assert ("blocks", window) in layout.made


def test_a_model_answers_the_same_through_flex_attention():
    import transformers

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "hidden_size": 64})).eval()
    batch, found = packed_batch(list(range(20, 40)), ROWS), []
    for flex in (False, True):
        shared_prefix.enable_shared_prefix(base, flex)
        with torch.no_grad():
            found.append(base(**batch.inputs).logits)
    assert ("blocks", None) in batch.inputs["layout"].made, "flex attention was used"
    assert torch.allclose(*found, atol=1e-5)


def test_flex_attention_is_for_gpus():
    assert (
        shared_prefix.uses_flex_attention("auto", "cuda:0")
        and not shared_prefix.uses_flex_attention("sdpa", "cuda:0")
        and not shared_prefix.uses_flex_attention("auto", "cpu")
    )
    with pytest.raises(TrainingError, match="GPUs only"):
        shared_prefix.uses_flex_attention("flex", "cpu")
