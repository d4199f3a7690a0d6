"""A LoRA adapter as mlx-lm takes it, on Apple's chips above all: adapters.safetensors with turned matrices, and its
settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pi_ray.errors import AdapterError
from pi_ray.run.artifact import write_atomic

MLX_ADAPTER = "adapters.safetensors"


def write_mlx_adapter(
    config: Any, base: str, scale: float, pairs: dict[tuple[str, str], torch.Tensor], folder: Path
) -> None:
    """Write both files. `config`: that of the base model; `base`: what `mlx_lm.generate --model` gets.

    mlx-lm names a layer's modules by their path within the layer, and has one rank for all of them. Raises AdapterError
    for an adapter with several ranks, or outside the decoder's layers.
    """
    ranks = {len(matrix) for (_, part), matrix in pairs.items() if part == "A"}
    keys = {module.partition(".layers.")[2].partition(".")[2] for module, _ in pairs}
    if len(ranks) != 1 or "" in keys:
        raise AdapterError("--to mlx takes one rank for all layers, inside the decoder alone; take --to merged")
    tensors = {f"{module}.lora_{part.lower()}": matrix.T.contiguous() for (module, part), matrix in pairs.items()}
    save_file(tensors, folder / MLX_ADAPTER, metadata={"format": "mlx"})
    parameters = {"rank": ranks.pop(), "scale": scale, "dropout": 0.0, "keys": sorted(keys)}
    settings = {
        "model": base, "fine_tune_type": "lora", "num_layers": config.num_hidden_layers, "lora_parameters": parameters,
    }  # fmt: skip
    write_atomic(folder / "adapter_config.json", json.dumps(settings, indent=1) + "\n")


def mlx_logits(base: Path, folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """The logits (rows, vocabulary) of the last token of each row, as mlx-lm computes them with this adapter."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = load_adapters(load_model(base)[0], str(folder))
    logits = [model(mx.array([row]))[0, -1].astype(mx.float32) for row in rows]
    return torch.stack([torch.tensor(values.tolist()) for values in logits])
