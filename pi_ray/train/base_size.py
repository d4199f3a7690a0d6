"""Counts of a base model by its config, without its weights: what a copy of it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from pi_ray.config import ModelConfig
from pi_ray.models import load_model_config

FOUR_BIT = 0.516  # bytes of a weight in NF4 with doubly quantised scales (Dettmers et al. 2023: 0.127 bits a weight)


@dataclass(frozen=True)
class BaseSize:
    """Counts of a base model by its config."""

    weights: int
    linear: int  # of them in linear layers, without the output layer: those that can be quantised
    cached: int  # numbers that the KV cache holds for each token

    def weight_bytes(self, config: ModelConfig, width: int) -> float:
        """Bytes of the weights where one has `width` bytes, or in four bits where `model.quantize` says so."""
        quantised = self.linear if config.quantize else 0
        return quantised * FOUR_BIT + (self.weights - quantised) * width


def base_size(config: ModelConfig) -> BaseSize:
    """Counted on the meta device; no weights are loaded. Raises ModelError for an unknown model."""
    shape = load_model_config(config)
    kind: Any = type(shape)
    return _size_of(kind, shape.to_json_string())


@cache
def _size_of(kind: Any, settings: str) -> BaseSize:
    """Count by a class of transformers' configs and its settings as JSON; a large model takes seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    shape = kind.from_dict(json.loads(settings))
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(shape)
    head = net.get_output_embeddings()
    linear = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    text = shape.get_text_config()
    cached = 2 * key_value_width(text) * text.num_hidden_layers
    return BaseSize(sum(p.numel() for p in net.parameters()), linear, cached)


def key_value_width(shape: Any) -> int:
    """Numbers of the keys of one token in one layer, by a config; recurrent models, which name no heads, have some."""
    heads = getattr(shape, "num_attention_heads", None) or 1
    width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return (getattr(shape, "num_key_value_heads", None) or heads) * width
