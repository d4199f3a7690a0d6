"""How gradients become one AdamW update over all workers: DeepSpeed ZeRO, or plain data parallelism.

Both give and take the same state: full fp32 weights and Adam moments by parameter name, free of world size and of ZeRO stage.
A loss is scaled by the caller so that the sum over workers is the gradient wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pi_ray.config import TrainConfig
from pi_ray.train import deepspeed_settings
from pi_ray.train.lora import trainable

MOMENTS = ("exp_avg", "exp_avg_sq")


class DdpBackend:
    """Gradients summed by all_reduce, torch AdamW on every worker. Needs no package besides torch; one worker needs no network."""

    def __init__(self, build: Callable[[], Any], config: TrainConfig, micro_batches: int = 1, bf16: bool = False):
        self.model = build()
        self.config = config
        self.params = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=config.lr, betas=deepspeed_settings.BETAS, eps=deepspeed_settings.EPS, weight_decay=config.weight_decay)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([p.grad.flatten() for p in self.params.values()])
            dist.all_reduce(flat)
            for p, g in zip(self.params.values(), flat.split([p.numel() for p in self.params.values()]), strict=True):
                p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(self.params.values(), self.config.grad_clip)
        _set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        return _named_state(self.params, lambda p: p.detach(), lambda p, key: self.optimizer.state[p].get(key, torch.zeros_like(p)))

    def load_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        for name, p in self.params.items():
            p.data.copy_(state[name])
            self.optimizer.state[p] = {"step": torch.tensor(float(updates)), **{key: state[f"{key}/{name}"].to(p.device).clone() for key in MOMENTS}}


class DeepSpeedBackend:
    """DeepSpeed ZeRO of `train.backend.zero_stage` (0 to 3). With stage 3 the base is sharded as it is loaded: no worker has all of it."""

    def __init__(self, build: Callable[[], Any], config: TrainConfig, micro_batches: int = 1, bf16: bool = False):
        import deepspeed

        # a compiled shared-memory all_reduce for inference: not used here, and building it would need a compiler on every worker
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config = config
        self.stage = config.backend.zero_stage
        settings = deepspeed_settings.settings(config, dist.get_world_size(), micro_batches, bf16)
        self.loading = deepspeed_settings.shard_while_loading(settings)
        model = build()
        deepspeed_settings.mark_leaves(model)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, model_parameters=list(trainable(model).values()), config=settings, dist_init_required=False)
        self.model = self.engine
        self.params = trainable(self.engine.module)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed averages over workers and micro-batches, the loss is already this worker's part of the sum
        self.engine.backward(loss * dist.get_world_size() * self.engine.gradient_accumulation_steps())
        if not last:
            self.engine.step()

    def step(self, lr: float) -> None:
        _set_lr(self.engine.optimizer, lr)
        self.engine.step()

    def state(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self._sharded:
            inner = _inner(self.engine.optimizer)
            return _named_state(self.params, lambda p: p.detach(), lambda p, key: inner.state[p].get(key, torch.zeros_like(p)))
        return _named_state(self.params, safe_get_full_fp32_param, safe_get_full_optimizer_state)

    def load_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._prime()
        inner = _inner(self.engine.optimizer)
        for name, p in self.params.items():
            if self._sharded:
                safe_set_full_fp32_param(p, state[name].to(p.device))
                for key in MOMENTS:
                    safe_set_full_optimizer_state(p, state[f"{key}/{name}"].to(p.device), key)
                with GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3):
                    p.data.copy_(state[name])
            else:
                p.data.copy_(state[name])
                for key in MOMENTS:
                    inner.state[p][key].copy_(state[f"{key}/{name}"])
        for entry in inner.state.values():
            entry["step"] = torch.tensor(float(updates))

    @property
    def _sharded(self) -> bool:
        return self.stage > 0 or self.engine.bfloat16_enabled()

    def _prime(self) -> None:
        """One update with zero gradients at rate zero: it moves nothing, and makes the optimiser state that load_state fills."""
        micro_batches = self.engine.gradient_accumulation_steps()
        for i in range(micro_batches):
            token = torch.zeros(1, 2, dtype=torch.long, device=self.engine.device)
            self.backward(self.engine(input_ids=token, use_cache=False).logits.float().sum() * 0.0, last=i == micro_batches - 1)
        self.step(0.0)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _named_state(params: dict[str, Any], weight: Any, moment: Any) -> dict[str, torch.Tensor]:
    state = {}
    for name, p in params.items():
        state[name] = weight(p).float().cpu().clone()
        for key in MOMENTS:
            state[f"{key}/{name}"] = moment(p, key).float().cpu().clone()
    return state
