"""The matrices of an adapter folder, read by their names and shapes: whatever else adapter_config.json says has no effect."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pi_ray.errors import AdapterError
from pi_ray.store.verify import CONFIG, LORA_TENSOR, WEIGHTS, read_header, read_json

MIXED = ".experts."  # linear layers of single experts, which see tokens of many rows in an order of their own


@dataclass(frozen=True)
class Matrices:
    """One adapter: module name -> (A of shape (rank, in), B of shape (out, rank) with the scaling in it), on the CPU in float32."""

    rank: int
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]


def linears(base: Any) -> dict[str, torch.nn.Linear]:
    """Name -> linear layer of a bare base model."""
    return {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}


def read(folder: Path | str, layers: dict[str, torch.nn.Linear]) -> Matrices:
    """The verified adapter in `folder`, for a base with `layers`. Raises AdapterError, before a matrix is read, when one does not fit its layer."""
    from safetensors.torch import load_file

    folder = Path(folder)
    saved = read_json(folder / CONFIG)
    check(folder / WEIGHTS, layers)
    rank = saved["r"]
    scale = saved["lora_alpha"] / (math.sqrt(rank) if saved.get("use_rslora") else rank)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        module, side = LORA_TENSOR.fullmatch(name).group(1, 2)
        sides.setdefault(module, {})[side] = tensor.float()
    return Matrices(rank, {module: (pair["A"], pair["B"] * scale) for module, pair in sides.items()})


def check(weights: Path, layers: dict[str, torch.nn.Linear]) -> None:
    """Raises AdapterError when the matrices of the file `weights` belong to layers that are not there or have other sizes."""
    for name, tensor in read_header(weights).items():
        module, side = LORA_TENSOR.fullmatch(name).group(1, 2)
        if module not in layers:
            raise AdapterError(f"it adapts {module!r}, which the base model does not have as a linear layer")
        if MIXED in module:
            raise AdapterError(f"it adapts {module!r}, one expert of several; adapters of single experts can be evaluated but not served")
        layer = layers[module]
        expected, found = (layer.in_features, tensor["shape"][1]) if side == "A" else (layer.out_features, tensor["shape"][0])
        if expected != found:
            raise AdapterError(f"its matrix {side} for {module!r} has size {found}, the base model's layer has {expected}")
