"""The LoRA weights of an adapter folder, by name and shape: of its config only rank and scaling have an effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pi_ray.errors import AdapterError
from pi_ray.store.verify import CONFIG_FILE, LORA_TENSOR, WEIGHTS_FILE, read_json, read_safetensors_header

EXPERT_LAYER = ".experts."  # single experts see tokens of many rows, in an order of their own


@dataclass(frozen=True)
class LoraWeights:
    """Module name -> (A (rank, in), B (out, rank) with the scaling in it) of one adapter, float32 on the CPU."""

    rank: int
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]


def linear_layers(base: Any) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer of a bare base model."""
    return {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}


def read_lora_weights(folder: Path | str, layers: dict[str, torch.nn.Linear]) -> LoraWeights:
    """Read a verified adapter. Raises AdapterError, before a tensor is read, when one does not fit its layer."""
    from safetensors.torch import load_file

    folder = Path(folder)
    saved = read_json(folder / CONFIG_FILE)
    check_lora_weights(folder / WEIGHTS_FILE, layers)
    rank = saved["r"]
    scale = saved["lora_alpha"] / (math.sqrt(rank) if saved.get("use_rslora") else rank)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for module, side, tensor in _by_module(load_file(folder / WEIGHTS_FILE)):
        sides.setdefault(module, {})[side] = tensor.float()
    return LoraWeights(rank, {module: (pair["A"], pair["B"] * scale) for module, pair in sides.items()})


def check_lora_weights(weights: Path, layers: dict[str, torch.nn.Linear]) -> None:
    """Raise AdapterError when tensors of the file `weights` belong to layers that do not exist or have other sizes."""
    for module, side, tensor in _by_module(read_safetensors_header(weights)):
        if module not in layers:
            raise AdapterError(f"it adapts {module!r}, which the base model does not have as a linear layer")
        if EXPERT_LAYER in module:
            raise AdapterError(
                f"it adapts {module!r}, one expert of several; adapters of single experts can be evaluated but not "
                "served"
            )
        layer, shape = layers[module], tensor["shape"]
        expected, found = (layer.in_features, shape[1]) if side == "A" else (layer.out_features, shape[0])
        if expected != found:
            raise AdapterError(
                f"its matrix {side} for {module!r} has size {found}, the base model's layer has {expected}"
            )


def _by_module(tensors: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(module, "A" or "B", tensor) of each tensor; verification has let no other names through."""
    for name, tensor in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        assert match, name
        yield match[1], match[2], tensor
