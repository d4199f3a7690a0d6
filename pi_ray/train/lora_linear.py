"""A linear layer and its LoRA matrices as one operation: what peft's layer computes, in fewer passes over memory.

peft keeps the matrices in fp32 and computes with them in fp32, so that a layer of a half-precision model copies its
input, its output and both gradients to fp32 and back. Here the matrices are rounded to the model's dtype for their
products, as under `torch.autocast`; sums are added inside the products. `python -m tests.bench.lora` measures both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear

FEW_ROWS = 16  # below, a generated token takes less time with matrices as they are than with rounded copies of them


def fuse_lora(model: Any) -> int:
    """Have the LoRA layers of a peft model that `LoraLinear` can compute do so; returns how many there are."""
    layers = [module for module in model.modules() if _fits(module)]
    for layer in layers:
        layer.__class__ = LoraLinear
    return len(layers)


def _fits(module: Any) -> bool:
    """Whether peft's plain layer stands on a frozen one of torch's, whose weight is there without calling it.

    ZeRO stage 3 (ds_id) and accelerate's offloading (_hf_hook) bring a weight when its module is called.
    """
    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear or module.lora_variant:
        return False
    base, weights = module.base_layer, list(module.base_layer.parameters())
    comes_late = hasattr(base.weight, "ds_id") or hasattr(base, "_hf_hook")
    return not (comes_late or module.fan_in_fan_out or any(p.requires_grad for p in weights))


class LoraLinear(Linear):
    """peft's layer with a forward pass of its own where one adapter without dropout is active, else peft's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in) -> (..., out)"""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or self._is_special(names[0]):
            return super().forward(x, *args, **kwargs)
        (name,), base = names, self.base_layer
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        if not torch.is_grad_enabled() and x.numel() < FEW_ROWS * x.shape[-1]:
            added = F.linear(F.linear(x.to(a.dtype), a), b)
            return base(x).add_(added, alpha=self.scaling[name])
        return _LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])

    def _is_special(self, name: str) -> bool:
        drops = self.training and not isinstance(self.lora_dropout[name], torch.nn.Identity)
        return drops or self.lora_bias[name] or hasattr(self.lora_A[name].weight, "ds_id")


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scale x A^T B^T, for x (..., in), W (out, in), A (rank, in), B (out, rank); W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
        rows, a, b = x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype)
        down = F.linear(rows, a)
        output = F.linear(rows, weight, bias).addmm_(down, b.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, down)
        ctx.scale = scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (rows, weight, a, b, down), (grad,) = ctx.saved_tensors, grads
        grad = grad.reshape(-1, grad.shape[-1])
        grad_down = (grad @ b).mul_(ctx.scale)
        grad_a, grad_b = grad_down.t() @ rows, (grad.t() @ down).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_down, a).view(*grads[0].shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b, None
