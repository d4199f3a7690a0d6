"""A LoRA adapter as one GGUF file, which llama.cpp, and what is built on it, loads beside its base model in GGUF.

The layout is llama.cpp's for adapters: `general.type` "adapter", a scale as `adapter.lora.alpha`, and for each weight
two tensors, its name with `.lora_a` (rank, in) and `.lora_b` (out, rank).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pi_ray.errors import AdapterError

GGUF_ADAPTER = "adapter.gguf"
# transformers' model type -> (llama.cpp's architecture, whether it rotates neighbouring dimensions of a head in pairs
# where transformers rotates halves, so that the rows of queries and keys stand in another order)
ARCHITECTURES = {
    "llama": ("LLAMA", True), "mistral": ("LLAMA", True), "qwen2": ("QWEN2", False), "qwen3": ("QWEN3", False),
}


def write_gguf_adapter(config: Any, scale: float, pairs: dict[tuple[str, str], torch.Tensor], path: Path) -> None:
    """Write the file. `config`: that of the base model; `pairs`: (module, "A" or "B") -> matrix.

    Raises AdapterError for an architecture or a layer that this layout is not known to express.
    """
    import gguf

    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise AdapterError(f"--to gguf: it knows layers of {known}, not of {config.model_type}; take --to merged")
    name, interleaved = ARCHITECTURES[config.model_type]
    architecture = gguf.MODEL_ARCH[name]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaved else {}
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = {len(matrix) for (_, part), matrix in pairs.items() if part == "A"}
    if len(ranks) != 1:
        raise AdapterError("--to gguf: its layers have several ranks, which share no scale there; take --to merged")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * ranks.pop())  # llama.cpp divides by the rank again
    for module, part in sorted(pairs):
        weight = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if weight is None:
            raise AdapterError(f"--to gguf: llama.cpp has no place for the layer {module!r}; take --to merged")
        matrix = pairs[module, part].float().numpy()
        if part == "B" and (count := heads.get(module.rpartition(".")[2])):
            matrix = interleave_halves(matrix, count)
        writer.add_tensor(f"{weight}.lora_{part.lower()}", np.ascontiguousarray(matrix))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads x dimension, n) with the two halves of each head's rows in turn: 0, d/2, 1, d/2 + 1 and so on."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)
