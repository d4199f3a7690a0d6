"""The fused LoRA layer: outputs and gradients of peft's own, on the layers that it fits and on no others."""

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear

from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.models import load_model
from pi_ray.train.lora import add_lora, trainable_parameters
from pi_ray.train.lora_linear import FEW_ROWS, LoraLinear, fuse_lora


class Net(torch.nn.Module):
    """Two linear layers, one with a bias, of which the first gives no gradient to its input."""

    def __init__(self, dtype):
        super().__init__()
        self.first = torch.nn.Linear(24, 40, dtype=dtype)
        self.second = torch.nn.Linear(40, 16, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))


def wrapped(dtype=torch.float32, **settings):
    """A peft model of `Net` whose matrices are all random."""
    torch.manual_seed(0)
    net = peft.get_peft_model(Net(dtype), peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **settings))
    for p in trainable_parameters(net).values():
        torch.nn.init.normal_(p, std=0.3)
    return net


def output_and_gradients(net, x):
    net.zero_grad()
    output = net(x)
    output.float().square().sum().backward()
    return output.detach(), {name: p.grad for name, p in trainable_parameters(net).items()}


def is_fused(net):
    return [type(module) is LoraLinear for module in net.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)], ids=str)
def test_outputs_and_gradients_are_those_of_peft(shape):
    net, x = wrapped(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected, expected_grads = output_and_gradients(net, x)
    assert fuse_lora(net) == 2
    output, grads = output_and_gradients(net, x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected_grads.keys() and len(grads) == 4
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_input_is_that_of_peft():
    net, grads = wrapped(), []
    for _ in range(2):
        x = torch.ones(3, 24, requires_grad=True)
        net(x).square().sum().backward()
        grads.append(x.grad)
        fuse_lora(net)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_in_bfloat16_matrices_and_their_gradients_stay_fp32_and_differ_by_rounding():
    net, x = wrapped(torch.bfloat16), torch.randn(64, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, expected_grads = output_and_gradients(net, x)
    fuse_lora(net)
    output, grads = output_and_gradients(net, x)
    assert output.dtype == torch.bfloat16
    assert ((output - expected).float().norm() / expected.float().norm()).item() < 0.01
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert ((grad - expected_grads[name]).norm() / expected_grads[name].norm()).item() < 0.02, name


@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_few_rows_and_many_have_the_outputs_of_peft(dtype, rows):
    net, x = wrapped(dtype), torch.randn(rows, 1, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = net(x)
        fuse_lora(net)
        output = net(x)
    assert output.dtype == dtype and output.shape == expected.shape
    assert ((output - expected).float().norm() / expected.float().norm()).item() < (
        1e-5 if dtype == torch.float32 else 0.01
    )


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "bias": "none"}, {"lora_dropout": 0.5}],
                         ids=str)
def test_what_it_does_not_compute_is_left_to_peft(settings):
    net, x = wrapped(**settings), torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    expected = net(x)
    fuse_lora(net)
    torch.manual_seed(3)
    assert torch.equal(net(x), expected)


def test_dropout_is_off_when_the_model_is_evaluated():
    net, x = wrapped(lora_dropout=0.5).eval(), torch.ones(3, 24)
    expected = net(x)
    fuse_lora(net)
    torch.testing.assert_close(net(x), expected)


def test_adapters_are_switched_disabled_and_merged_as_before():
    net, x = wrapped(), torch.ones(2, 24)
    net.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    fuse_lora(net)
    plain = [layer.__class__ for layer in net.modules() if isinstance(layer, LoraLinear)]
    found = {}
    for name in ("default", "other"):
        net.set_adapter(name)
        found[name] = net(x)
        net.merge_adapter()
        torch.testing.assert_close(net(x), found[name], rtol=1e-4, atol=1e-4)
        net.unmerge_adapter()
    assert plain and not torch.allclose(found["default"], found["other"], atol=0.01)
    with net.disable_adapter():
        assert not torch.allclose(net(x), found["other"], atol=0.01)
    net.base_model.set_adapter(["default", "other"])  # two at once: peft's own
    assert not torch.allclose(net(x), found["other"], atol=0.01)


def test_a_base_layer_that_is_trained_too_keeps_its_gradient():
    net = wrapped()
    net.base_model.model.first.base_layer.bias.requires_grad_()
    assert fuse_lora(net) == 1 and is_fused(net) == [False, True]
    net(torch.ones(2, 24)).sum().backward()
    assert net.base_model.model.first.base_layer.bias.grad.any()


def test_layers_of_other_kinds_and_sharded_weights_are_left_alone(tiny_mixtral):
    net = wrapped()
    net.base_model.model.first.base_layer.weight.ds_id = 1  # as ZeRO stage 3 marks what it shards
    assert fuse_lora(net) == 1 and is_fused(net) == [False, True]
    mixtral = add_lora(load_model(ModelConfig(base=str(tiny_mixtral))), LoraConfig(rank=2, experts=True), seed=0)
    assert is_fused(mixtral) and all(is_fused(mixtral))
