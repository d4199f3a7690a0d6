"""The base model with an adapter in its weights, in the transformers layout.

The base's safetensors are read and written a file at a time, so that no more than one of them is in memory, in the
dtype that they have.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pi_ray.config import ModelConfig
from pi_ray.errors import ModelError
from pi_ray.models.base_files import resolve_base

COPIED = {".json", ".model", ".txt", ".jinja", ".tiktoken"}  # endings of settings and tokenizers
MOST_LEFT_OUT = 2  # names of modules at the beginning that a checkpoint may leave out


def write_merged(
    model: ModelConfig, scale: float, pairs: dict[tuple[str, str], torch.Tensor], folder: Path,
    say: Callable[[str], Any],
) -> None:
    """Write weights, settings and tokenizer. `pairs`: (module, "A" or "B") -> matrix; their product counts `scale`.

    Raises ModelError for a base that cannot be read, or stores its weights under other names.
    """
    source = _base_folder(model)
    files = sorted(path for path in source.iterdir() if path.name.endswith(".safetensors"))
    if not files:
        raise ModelError(f"{source}: its weights are no safetensors; convert them, or export with --to peft")
    names = {name for path in files for name in _names(path)}
    places = _places(names, {module for module, _ in pairs})
    if unplaced := sorted({module for module, _ in pairs} - places.keys()):
        raise ModelError(
            f"{model.base} stores {unplaced[0]} (and {len(unplaced) - 1} more) under other names than transformers "
            "loads it by, so that the adapter cannot be added file by file; export with --to peft"
        )
    modules, turned = {name: module for module, name in places.items()}, _turned_modules(source)
    for i, path in enumerate(files, start=1):
        tensors = {}
        with safe_open(path, "pt") as shard:
            metadata = shard.metadata() or {"format": "pt"}
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                weight = shard.get_tensor(name)
                if module := modules.get(name):
                    product = (pairs[module, "B"].float() @ pairs[module, "A"].float()) * scale
                    weight = _added(weight, product.T if module in turned else product, name)
                tensors[name] = weight
        save_file(tensors, folder / path.name, metadata=metadata)
        say(f"weights: file {i} of {len(files)}")
    for path in source.iterdir():
        if path.suffix in COPIED and path.name != "manifest.json":
            shutil.copyfile(path, folder / path.name)


def _added(weight: torch.Tensor, product: torch.Tensor, name: str) -> torch.Tensor:
    if product.shape != weight.shape or not weight.is_floating_point():
        raise ModelError(f"{name}: the base stores a weight of another shape or kind than the adapter was trained on")
    return (weight.float() + product).to(weight.dtype).contiguous()


def _turned_modules(folder: Path) -> set[str]:
    """The modules whose weight is (in, out), as GPT-2 has them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _base_folder(model: ModelConfig) -> Path:
    """The folder with the base model's files; those of a hub id are fetched."""
    found = resolve_base(model.base)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    try:
        endings = [f"*{ending}" for ending in (*COPIED, ".safetensors")]
        return Path(snapshot_download(found, revision=model.revision or "main", allow_patterns=endings))
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{model.base}' cannot be fetched: {str(error).strip().splitlines()[0]}") from error


def _names(path: Path) -> Iterator[str]:
    with safe_open(path, "pt") as shard:
        yield from shard.keys()


def _places(names: set[str], modules: set[str]) -> dict[str, str]:
    """Module -> the tensor that is its weight. A checkpoint may leave out the name of the decoder inside the model."""
    found = {}
    for module in modules:
        parts = module.split(".")
        candidates = (".".join([*parts[start:], "weight"]) for start in range(MOST_LEFT_OUT + 1))
        if name := next((candidate for candidate in candidates if candidate in names), ""):
            found[module] = name
    return found
