"""Gist tokens (Mu et al. 2024; paper A.3, Table 7): rows see the template through k trained tokens alone, whose activations inference caches.

A prefix becomes `template + ids(k)`. The rows behind it attend to its gist positions and to themselves, so nothing else of the template reaches an
answer. Gist ids are negative: the vocabulary and the output layer stay the base model's, and a gist token can be fed but never be answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from pi_ray.models import last

FILE = "gist.safetensors"  # beside the LoRA matrices, which have a file of their own
PARAMETER = "gist"


def ids(k: int) -> list[int]:
    return list(range(-1, -k - 1, -1))


def count(prefix: Sequence[int]) -> int:
    """How many gist tokens a prefix ends with."""
    return sum(token < 0 for token in prefix)


class GistEmbedding(torch.nn.Module):
    """The base model's input embeddings, and (k, D) trained ones for the ids -1 to -k, which start as the mean of all, as in Mu et al."""

    def __init__(self, base: torch.nn.Module, k: int):
        super().__init__()
        self.base = base
        self.register_parameter(PARAMETER, torch.nn.Parameter(base.weight.detach().float().mean(0).repeat(k, 1)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gist embeddings take part whatever the tokens, so that every worker has their gradient, if only zeros."""
        known, gists = self.base(tokens.clamp(min=0)), F.embedding((-1 - tokens).clamp(min=0), self.gist)
        return torch.where((tokens < 0)[..., None], gists.to(known.dtype), known)


def attach(model: Any, k: int) -> None:
    """Give a peft model k gist embeddings, which are trained beside its adapter."""
    base = model.get_base_model()
    base.set_input_embeddings(GistEmbedding(base.get_input_embeddings(), k))


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the gist embeddings among `weights` (full fp32 tensors by parameter name), where there are any."""
    from safetensors.torch import save_file

    for name, value in weights.items():
        if name.endswith(f".{PARAMETER}"):
            save_file({PARAMETER: value.contiguous()}, folder / FILE)


def read(folder: Path) -> torch.Tensor | None:
    """The (k, D) gist embeddings of an adapter folder; None where it was trained without."""
    from safetensors.torch import load_file

    return load_file(folder / FILE)[PARAMETER] if (folder / FILE).exists() else None


@torch.inference_mode()
def gist_cache(model: Any, prefix: Sequence[int], gists: torch.Tensor) -> DynamicCache:
    """Keys and values of the gist tokens that `prefix` ends with, batch 1: the template is computed once and dropped. `gists` (k, D) as saved."""
    known = model.get_input_embeddings()(torch.tensor([list(prefix[: -len(gists)])], device=model.device))
    cache = DynamicCache()
    model(inputs_embeds=torch.cat([known, gists[None].to(known)], 1), past_key_values=cache, use_cache=True, logits_to_keep=last(1, known.device))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -len(gists) :].clone(), layer.values[:, :, -len(gists) :].clone()
    return cache
