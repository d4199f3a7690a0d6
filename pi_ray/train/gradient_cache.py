"""A prefix's cache that gradients flow through: rows go on from it, and one backward pass reaches the prefix from them.

transformers' caches write states in place, which gradients do not survive; here they are assigned. Its checkpointing of
layers leaves no cache; here a layer that is computed again finds the cache that it found the first time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer


class GradientCache(DynamicCache):
    """Keys, values and states of one prefix, kept in the graph; then each of several rows goes on from them."""

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.read = False  # whether the prefix is; what rows add is read by no one
        for layer in self.layers:
            _assign_states(layer)

    def copied(self) -> GradientCache:
        """A cache of the same tensors, to which more can be added without changing this one."""
        other = copy.copy(self)
        other.layers = [_copied(layer) for layer in self.layers]
        return other

    def expand(self, rows: int) -> None:
        """Let every one of `rows` rows begin with what was read, which none of them copies."""
        self.read = True
        for layer in self.layers:
            kept: Any = layer  # of one kind or another
            for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                for i, state in states.items():
                    states[i] = None if state is None else state.expand(rows, *state.shape[1:])
            if getattr(kept, "keys", None) is not None:
                kept.keys, kept.values = (x.expand(rows, *x.shape[1:]) for x in (kept.keys, kept.values))


def checkpoint_layers(model: Any) -> Callable[[], None]:
    """Have the layers of a transformers model computed again in the backward pass, also where they use a GradientCache,
    in place of transformers' own checkpointing. Returns what brings that back.
    """
    flagged = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in flagged:
        module.gradient_checkpointing = False
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)

    def undo() -> None:
        for layer in layers:
            del layer.forward  # which hid that of its class
        for module in flagged:
            module.gradient_checkpointing = True

    return undo


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer's output; what it adds to a cache is added to the caller's once, in the first of its two passes."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    found = [(name, value) for name, value in kwargs.items() if isinstance(value, GradientCache)]
    if not found:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    (name, cache), before, passes = found[0], found[0][1].copied(), list[GradientCache]()

    def run(*args: Any) -> Any:
        own = before.copied()
        passes[:] = passes or [own]
        return forward(*args, **{**kwargs, name: own})

    output = checkpoint(run, *args, use_reentrant=False)
    if not cache.read:
        cache.layers = passes[0].layers
    passes[0] = before  # the graph holds on to `run`, and should not to what rows have added
    return output


def _copied(layer: Any) -> Any:
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict | list):
            setattr(other, name, copy.copy(value))
    _assign_states(other)
    return other


def _assign_states(layer: Any) -> None:
    if isinstance(layer, LinearAttentionLayer):
        vars(layer)["update_conv_state"] = partial(_assign_conv_state, layer)
        vars(layer)["update_recurrent_state"] = partial(_assign_recurrent_state, layer)


def _assign_conv_state(
    layer: Any, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
) -> torch.Tensor:
    """Keep the last inputs of a convolution; returns the new ones (B, D, tokens) behind those that were kept."""
    if not layer.is_conv_states_initialized[state_idx]:
        sizes: dict[str, Any] = {"state_idx": state_idx, "conv_kernel_size": conv_kernel_size}
        layer.lazy_initialization(conv_states=conv_states, **sizes)
    size, whole = layer.conv_kernel_size[state_idx], conv_states
    if layer.has_previous_state[state_idx]:
        whole = torch.cat([layer.conv_states[state_idx], conv_states], -1)
    elif conv_states.shape[-1] < size:
        whole = F.pad(conv_states, (size - conv_states.shape[-1], 0))
    layer.has_previous_state[state_idx] = True
    layer.conv_states[state_idx] = whole[..., -size:]
    return whole


def _assign_recurrent_state(layer: Any, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
    layer.is_recurrent_states_initialized[state_idx] = True
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states
