"""Gist tokens (Mu et al. 2024; paper A.3, Table 7): rows see the template only through k trained tokens.

A prefix becomes `template + gist_ids(k)`. Rows attend to its gist positions and to themselves, so inference caches the
activations of k tokens. Gist ids are negative, so that vocabulary and output layer stay the base model's: a gist token
can be fed but never be generated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from pi_ray.models import last_logits_index

FILE = "gist.safetensors"  # beside adapter_model.safetensors


def gist_ids(k: int) -> list[int]:
    return list(range(-1, -k - 1, -1))


def count_gist_tokens(prefix: Sequence[int]) -> int:
    """How many gist tokens a prefix ends with."""
    return sum(token < 0 for token in prefix)


class GistEmbedding(torch.nn.Module):
    """The base model's input embeddings, and (k, D) trained ones for ids -1 to -k, which start as the mean of all."""

    def __init__(self, base: Any, k: int):
        super().__init__()
        self.base = base
        self.gist = torch.nn.Parameter(base.weight.detach().float().mean(0).repeat(k, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of `tokens`. Gist embeddings always take part, so that every worker has gradients of them."""
        known, gists = self.base(tokens.clamp(min=0)), F.embedding((-1 - tokens).clamp(min=0), self.gist)
        return torch.where((tokens < 0)[..., None], gists.to(known.dtype), known)


def add_gist_embeddings(model: Any, k: int) -> None:
    """Give a peft model k gist embeddings, which are trained beside its adapter."""
    base = model.get_base_model()
    base.set_input_embeddings(GistEmbedding(base.get_input_embeddings(), k))


def save_gist(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the gist embeddings among `weights` (full fp32 tensors by parameter name), if there are any."""
    for name, value in weights.items():
        if name.endswith(".gist"):
            save_file({"gist": value.contiguous()}, folder / FILE)


def load_gist(folder: Path) -> torch.Tensor | None:
    """The (k, D) gist embeddings of an adapter folder; None where it was trained without."""
    return load_file(folder / FILE)["gist"] if (folder / FILE).exists() else None


@torch.inference_mode()
def gist_cache(model: Any, prefix: Sequence[int], gists: torch.Tensor) -> DynamicCache:
    """Keys and values, batch 1, of the gist tokens that `prefix` ends with; `gists` are their (k, D) embeddings."""
    k, device = len(gists), model.device
    known = model.get_input_embeddings()(torch.tensor([list(prefix[:-k])], device=device))
    embeds, cache = torch.cat([known, gists[None].to(known)], 1), DynamicCache()
    model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=last_logits_index(1, device))
    layers: Any = cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, -k:].clone(), layer.values[:, :, -k:].clone()
    return cache
