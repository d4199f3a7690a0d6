"""DeepSpeed ZeRO: the settings of a run, and what stage 3 must know before a model is loaded and sharded."""

from __future__ import annotations

from typing import Any

from pi_ray.config import TrainConfig

BETAS, EPS = (0.9, 0.999), 1e-8


def settings(config: TrainConfig, world: int, micro_batches: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. `micro_batches` make one update on one of `world` workers."""
    backend, host = config.backend, {"device": "cpu", "pin_memory": True}
    optimization: dict[str, Any] = {"stage": backend.zero_stage, "contiguous_gradients": True, "overlap_comm": False}
    if backend.offload_optimizer:
        optimization["offload_optimizer"] = host
    if backend.offload_params:
        optimization["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // (world * micro_batches),
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": optimization,
        # torch's AdamW, also where the optimiser is offloaded: no compiler is needed on the workers
        "optimizer": {"type": "AdamW", "params": {"lr": config.lr, "betas": BETAS, "eps": EPS, "weight_decay": config.weight_decay, "torch_adam": True}},
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }


def shard_while_loading(settings: dict[str, Any]) -> Any:
    """For stage 3: as long as what is returned lives, `from_pretrained` shards every weight over the workers as soon as it is made.

    The first worker reads the checkpoint (memory-mapped, one tensor at a time) and hands out the shards; peft gathers what it needs to see whole.
    """
    if settings["zero_optimization"]["stage"] < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)


def mark_leaves(model: Any) -> list[Any]:
    """Have each mixture of experts gathered whole: which experts run differs between workers, so stage 3 cannot follow them one by one. Returns the blocks."""
    blocks = moe_blocks(model)
    for block in blocks:
        block._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_modules sets, for blocks of any class
    return blocks


def moe_blocks(model: Any) -> list[Any]:
    """The modules that hold experts, as MixtralSparseMoeBlock and its like in other models do."""
    import torch

    return [m for m in model.modules() if isinstance(m._modules.get("experts"), torch.nn.Module)]
