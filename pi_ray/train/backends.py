"""Training backends: gradients become one AdamW update over all workers, by data parallelism or DeepSpeed ZeRO.

Both give and take the same state: full fp32 weights and Adam moments by parameter name, whatever the world size and
ZeRO stage. Losses come scaled so that their gradients are to be summed over micro-batches and workers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pi_ray.config import TrainConfig
from pi_ray.train.lora import moe_blocks, trainable_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS, EPS = (0.9, 0.999), 1e-8


class DdpBackend:
    """Data parallelism: gradients summed by all_reduce, torch's AdamW on every worker. One worker needs no network."""

    def __init__(self, build: Callable[[], Any], config: TrainConfig, micro_batches: int = 1, bf16: bool = False):
        self.model, self.config = build(), config
        self.params = trainable_parameters(self.model)
        self.optimizer = torch.optim.AdamW(
            self.params.values(), lr=config.lr, betas=BETAS, eps=EPS, weight_decay=config.weight_decay, fused=True
        )

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            grads: list[Any] = [p.grad for p in self.params.values()]
            flat = torch.nn.utils.parameters_to_vector(grads)
            dist.all_reduce(flat)
            torch.nn.utils.vector_to_parameters(flat, grads)
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.grad_clip)
        _set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        return _unsharded_state(self.params, self.optimizer)

    def load_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        for name, p in self.params.items():
            p.data.copy_(state[name])
            moments = {key: state[f"{key}/{name}"].to(p.device).clone() for key in MOMENTS}
            step = torch.tensor(float(updates), device=p.device)
            self.optimizer.state[p] = {"step": step, **moments}


class DeepSpeedBackend:
    """DeepSpeed ZeRO, stages 0 to 3 (`train.backend.zero_stage`). Stage 3 shards the base model while it is loaded."""

    def __init__(self, build: Callable[[], Any], config: TrainConfig, micro_batches: int = 1, bf16: bool = False):
        import deepspeed

        # a compiled all_reduce in shared memory, for inference; to build it would need a compiler on every worker
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage = config.backend.zero_stage
        self.sharded = self.stage > 0 or bf16
        settings = deepspeed_config(config, dist.get_world_size(), micro_batches, bf16)
        self.loading = shard_while_loading(settings)
        model = build()
        mark_zero3_leaves(model)
        self.model = self.engine = deepspeed.initialize(
            model=model, model_parameters=list(trainable_parameters(model).values()), config=settings,
            dist_init_required=False,
        )[0]
        self.params = trainable_parameters(self.engine.module)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed takes the mean over workers and micro-batches, and the gradients are to be summed
        self.engine.backward(loss * dist.get_world_size() * self.engine.gradient_accumulation_steps())
        if not last:
            self.engine.step()

    def step(self, lr: float) -> None:
        _set_lr(self.engine.optimizer, lr)
        self.engine.step()

    def state(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.sharded:
            return _named_state(self.params, safe_get_full_fp32_param, safe_get_full_optimizer_state)
        return _unsharded_state(self.params, self._torch_optimizer())

    def load_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._create_optimizer_state()
        optimizer = self._torch_optimizer()
        for name, p in self.params.items():
            if self.sharded:
                safe_set_full_fp32_param(p, state[name].to(p.device))
            for key in MOMENTS:
                moment = state[f"{key}/{name}"].to(p.device)
                if self.sharded:
                    safe_set_full_optimizer_state(p, moment, key)
                else:
                    optimizer.state[p][key].copy_(moment)
            with GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3):
                p.data.copy_(state[name])
        for entry in optimizer.state.values():
            entry["step"] = torch.tensor(float(updates))

    def _create_optimizer_state(self) -> None:
        """One update with zero gradients at learning rate 0: it moves no weight and makes the state to be loaded."""
        micro_batches = self.engine.gradient_accumulation_steps()
        for i in range(micro_batches):
            token = torch.zeros(1, 2, dtype=torch.long, device=self.engine.device)
            logits = self.engine(input_ids=token, use_cache=False).logits
            self.backward(logits.float().sum() * 0.0, last=i == micro_batches - 1)
        self.step(0.0)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimiser inside DeepSpeed's wrappers."""
        optimizer = self.engine.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer


def deepspeed_config(config: TrainConfig, world: int, micro_batches: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration, for `world` workers that each sum `micro_batches` of an update."""
    backend, host = config.backend, {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": backend.zero_stage, "contiguous_gradients": True}
    zero["overlap_comm"] = torch.cuda.is_available()  # sums gradients beside computing; CPUs have no streams
    if backend.offload_optimizer:
        zero["offload_optimizer"] = host
    if backend.offload_params:
        zero["offload_param"] = host
    adam = {"lr": config.lr, "betas": BETAS, "eps": EPS, "weight_decay": config.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // (world * micro_batches)),
        "gradient_accumulation_steps": micro_batches, "zero_optimization": zero,
        # torch's AdamW, even where the optimiser is offloaded: workers need no compiler
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
        "gradient_clipping": config.grad_clip, "bf16": {"enabled": bf16}, "steps_per_print": 10**9,
    }


def shard_while_loading(deepspeed_config: dict[str, Any]) -> Any:
    """For stage 3: while the returned object lives, `from_pretrained` shards each weight as soon as it is made."""
    if deepspeed_config["zero_optimization"]["stage"] < 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(deepspeed_config)


def mark_zero3_leaves(model: Any) -> None:
    """Have stage 3 gather each mixture of experts whole, since workers run different experts."""
    for block in moe_blocks(model):
        block._z3_leaf = True  # as deepspeed.utils.set_z3_leaf_modules does, for blocks of any class


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _unsharded_state(params: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return _named_state(params, torch.Tensor.detach, lambda p, key: optimizer.state[p].get(key, torch.zeros_like(p)))


def _named_state(params: dict[str, Any], weight: Any, moment: Any) -> dict[str, torch.Tensor]:
    """Weights by parameter name and moments by "exp_avg/NAME": full fp32 copies on the CPU."""
    state = {}
    for name, p in params.items():
        state[name] = weight(p).float().cpu().clone()
        for key in MOMENTS:
            state[f"{key}/{name}"] = moment(p, key).float().cpu().clone()
    return state
