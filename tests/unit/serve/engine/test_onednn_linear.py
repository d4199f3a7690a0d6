"""Packed linear layers compute the same, keep name, hooks and size, and give way where a model needs its plain
weights.
"""

import pytest
import torch
import transformers

from pi_ray.config import ModelConfig
from pi_ray.models import load_model
from pi_ray.serve.engine.onednn_linear import get_weight, set_weight, use_onednn_linears

IDS = torch.tensor([[5, 6, 7, 8]])

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def model(tiny_model):
    return load_model(ModelConfig(base=str(tiny_model)))


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_packed_model_computes_the_same_from_weights_of_the_same_size(model):
    plain, before = logits(model), sum(p.nbytes for p in model.parameters())
    weights = {name: m.weight.clone() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert use_onednn_linears(model)
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-4)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert layers.keys() == weights.keys()
    assert all(
        torch.equal(get_weight(layer), weights[name]) and layer.out_features == len(weights[name])
        for name, layer in layers.items()
    )
    assert sum(p.nbytes for p in model.parameters()) == before - sum(w.nbytes for w in weights.values()), (
        "the plain weights are given up"
    )


def test_hooks_of_a_packed_layer_see_its_output(model):
    assert use_onednn_linears(model)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].shape, output.shape))
    )
    logits(model)
    assert seen == [((1, 4, 32), (1, 4, 64))]


def test_a_packed_layer_takes_another_weight_and_the_embeddings_that_it_was_tied_to_do_not(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    assert use_onednn_linears(model)
    set_weight(model.lm_head, get_weight(model.lm_head) * 0)
    assert logits(model).abs().max() == 0
    assert model.model.embed_tokens.weight.abs().max() > 0


def test_layers_with_a_bias_keep_it():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    plain = logits(model)
    assert use_onednn_linears(model)
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-4)


def test_a_model_that_reads_its_weights_itself_is_left_as_it_was():
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=0, bos_token_id=0
        )
    ).eval()
    plain = logits(model)
    assert not use_onednn_linears(model)
    assert torch.equal(logits(model), plain)


def test_bfloat16_layers_are_not_packed(tiny_model):
    model = load_model(ModelConfig(base=str(tiny_model), dtype="bfloat16"))
    plain = logits(model)
    use_onednn_linears(model)
    assert torch.equal(logits(model), plain)
