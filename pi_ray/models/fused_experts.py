"""LoRA of fused experts, as peft's `target_parameters` saves it: one pair of matrices for all experts of a weight.

A mixture of experts holds `experts.gate_up_proj` and `experts.down_proj` as (experts, out, in), or (experts, in, out).
peft puts a wrapper around `experts` for each of them, the first innermost, and names the matrices by the wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

WRAPPED = ".base_layer"  # ends the name of a module inside a wrapper of peft's


class FusedExperts(NamedTuple):
    """The weight of all experts of a layer that one pair of matrices adapts."""

    parameter: str  # its name in the model
    experts: int
    in_features: int
    out_features: int
    is_transposed: bool  # (experts, in, out)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B A of each expert, in the weight's shape. `a`: (experts * rank, in); `b`: (out, rank * experts)."""
        import torch

        rows = a.reshape(self.experts, -1, self.in_features)
        columns = b.reshape(self.out_features, -1, self.experts)
        return torch.einsum("ore,eri->eio" if self.is_transposed else "ore,eri->eoi", columns, rows)


def find_fused_experts(model: Any, targets: Sequence[str]) -> dict[str, FusedExperts]:
    """Module that an adapter's matrices are named after -> the weight that peft's target_parameters, `targets`, adapt.
    """
    found = {}
    for name, module in model.named_modules():
        weights = {
            key: weight for key, weight in module.named_parameters(recurse=False)
            if weight.dim() == 3 and any(f".{name}.{key}".endswith(f".{target}") for target in targets)
        }  # fmt: skip
        is_transposed = bool(getattr(module, "is_transposed", False))
        for depth, (key, weight) in enumerate(reversed(weights.items())):
            experts, *features = weight.shape
            inner, outer = features if is_transposed else reversed(features)
            found[name + WRAPPED * depth] = FusedExperts(f"{name}.{key}", experts, inner, outer, is_transposed)
    return found


def unwrapped(module: str) -> str:
    """The name of the model's own module inside peft's wrappers."""
    while module.endswith(WRAPPED):
        module = module.removesuffix(WRAPPED)
    return module


def is_of_experts(module: str, targets: Sequence[str]) -> bool:
    """Whether a module of an adapter's file is a wrapper around a module that has one of the `targets`."""
    return any(f".{unwrapped(module)}".endswith(f".{target.rpartition('.')[0]}") for target in targets if "." in target)
