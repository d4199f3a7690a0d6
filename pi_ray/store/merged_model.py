"""The base model with an adapter in its weights, in the transformers layout.

The base's safetensors are read and written a file at a time, so that no more than one of them is in memory, in the
dtype that they have. Where a checkpoint stores weights otherwise than the model holds them, such as the experts of
Mixtral one by one, what the adapter adds is turned by transformers' own conversion, the way back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from pi_ray.config import ModelConfig
from pi_ray.errors import ModelError
from pi_ray.models.base_files import resolve_base
from pi_ray.models.fused_experts import find_fused_experts, unwrapped

COPIED = {".json", ".model", ".txt", ".jinja", ".tiktoken"}  # endings of settings and tokenizers
MOST_LEFT_OUT = 2  # names of modules at the beginning that a checkpoint may leave out


def write_merged(
    model: ModelConfig, scale: float, pairs: dict[tuple[str, str], torch.Tensor], targets: Sequence[str], folder: Path,
    say: Callable[[str], Any],
) -> None:
    """Write weights, settings and tokenizer. `pairs`: (module, "A" or "B") -> matrix; their product counts `scale`.

    `targets` are peft's target_parameters. Raises ModelError for a base that cannot be read, or stores its weights
    under names that transformers does not tell.
    """
    source = _base_folder(model)
    files = sorted(path for path in source.iterdir() if path.name.endswith(".safetensors"))
    if not files:
        raise ModelError(f"{source}: its weights are no safetensors; convert them, or export with --to peft")
    names = {name for path in files for name in _names(path)}
    added = AddedWeights(source, scale, pairs, targets)
    places = added.places(names)
    if unplaced := sorted(added.layers() - set(places.values())):
        raise ModelError(
            f"{model.base} stores {unplaced[0]} (and {len(unplaced) - 1} more) under other names than transformers "
            "loads it by, so that the adapter cannot be added file by file; export with --to peft"
        )
    layer, products = "", {}
    for i, path in enumerate(files, start=1):
        tensors = {}
        with safe_open(path, "pt") as shard:
            metadata = shard.metadata() or {"format": "pt"}
            for name in sorted(shard.keys(), key=lambda name: places.get(name, "")):
                weight = shard.get_tensor(name)
                if name in places:
                    if places[name] != layer:
                        layer = places[name]
                        products = added.stored(added.products(layer), names)
                    weight = _added(weight, products[name], name)
                tensors[name] = weight
        save_file(tensors, folder / path.name, metadata=metadata)
        say(f"weights: file {i} of {len(files)}")
    for path in source.iterdir():
        if path.suffix in COPIED and path.name != "manifest.json":
            shutil.copyfile(path, folder / path.name)


class AddedWeights:
    """The products of an adapter's matrices, layer by layer: of a linear layer, or of the experts of a block."""

    def __init__(
        self, folder: Path, scale: float, pairs: dict[tuple[str, str], torch.Tensor], targets: Sequence[str]
    ):
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self._model = AutoModelForCausalLM.from_config(config)
        self._scale, self._pairs = scale, pairs
        self._experts = find_fused_experts(self._model, targets)
        self._turned = {name for name, module in self._model.named_modules() if isinstance(module, Conv1D)}
        self._modules: dict[str, list[str]] = {}  # layer -> the modules of the adapter's file that adapt it
        for module in sorted({module for module, _ in pairs}):
            self._modules.setdefault(unwrapped(module), []).append(module)

    def layers(self) -> set[str]:
        return set(self._modules)

    def places(self, names: set[str]) -> dict[str, str]:
        """Name of a tensor in the checkpoint -> the layer that it is a part of."""
        found: dict[str, str] = {}
        for layer, modules in self._modules.items():
            weights = {}
            for name in map(self._parameter, modules):
                weights[name] = self._model.get_parameter(name)
            found |= dict.fromkeys(self.stored(weights, names), layer)
        return found

    def products(self, layer: str) -> dict[str, torch.Tensor]:
        """Compute what is added to each parameter of the model in `layer`."""
        return {self._parameter(module): self._product(module) for module in self._modules[layer]}

    def stored(self, tensors: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
        """`tensors`, by the model's names, as a checkpoint with these `names` has them; {} where that is not known.

        A checkpoint may leave out the name of the decoder inside the model.
        """
        for known in (revert_weight_conversion(self._model, tensors), tensors):
            for start in range(MOST_LEFT_OUT + 1):
                found = {".".join(name.split(".")[start:]): tensor for name, tensor in known.items()}
                if found.keys() <= names:
                    return found
        return {}

    def _parameter(self, module: str) -> str:
        return self._experts[module].parameter if module in self._experts else f"{module}.weight"

    def _product(self, module: str) -> torch.Tensor:
        a, b = (self._pairs[module, side].float() for side in "AB")
        if module in self._experts:
            return self._experts[module].product(a, b) * self._scale
        return ((b @ a).T if module in self._turned else b @ a) * self._scale


def _added(weight: torch.Tensor, product: torch.Tensor, name: str) -> torch.Tensor:
    if product.shape != weight.shape or not weight.is_floating_point():
        raise ModelError(f"{name}: the base stores a weight of another shape or kind than the adapter was trained on")
    return (weight.float() + product).to(weight.dtype).contiguous()


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
