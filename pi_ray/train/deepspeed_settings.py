"""DeepSpeed ZeRO: the configuration of a run, and what stage 3 needs before a model is loaded and sharded."""

from __future__ import annotations

from typing import Any

from pi_ray.config import TrainConfig

BETAS, EPS = (0.9, 0.999), 1e-8


def deepspeed_config(config: TrainConfig, world: int, micro_batches: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration, for `world` workers that each sum `micro_batches` of an update."""
    backend, host = config.backend, {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": backend.zero_stage, "contiguous_gradients": True, "overlap_comm": False}
    if backend.offload_optimizer:
        zero["offload_optimizer"] = host
    if backend.offload_params:
        zero["offload_param"] = host
    adam = {"lr": config.lr, "betas": BETAS, "eps": EPS, "weight_decay": config.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // (world * micro_batches),
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": zero,
        # torch's AdamW, even where the optimiser is offloaded: workers need no compiler
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }


def shard_while_loading(deepspeed_config: dict[str, Any]) -> Any:
    """For stage 3: while the returned object lives, `from_pretrained` shards each weight as soon as it is made.

    The first worker reads the model's files (memory-mapped, one tensor at a time) and hands out the shards; peft
    gathers a weight where it needs the whole.
    """
    if deepspeed_config["zero_optimization"]["stage"] < 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(deepspeed_config)


def mark_zero3_leaves(model: Any) -> list[Any]:
    """Have stage 3 gather each mixture of experts whole, since workers run different experts; returns the blocks."""
    blocks = moe_blocks(model)
    for block in blocks:
        block._z3_leaf = True  # as deepspeed.utils.set_z3_leaf_modules does, for blocks of any class
    return blocks


def moe_blocks(model: Any) -> list[Any]:
    """The modules that hold experts, such as MixtralSparseMoeBlock."""
    import torch

    return [m for m in model.modules() if isinstance(m._modules.get("experts"), torch.nn.Module)]
