"""Updates with pi-ray's LoRA layer against updates with peft's: the same model, rows, loss and gradients.

    python -m tests.bench.lora [--model smollm2-135m] [--dtype bfloat16] [--rank 32] [--rounds 9]

Forward and backward passes of one shared-prefix batch, with a prompt and with the query alone. The peers are peft's
layer with matrices in fp32, as it makes them, and with matrices in the model's dtype, as DeepSpeed's bf16 training has
them. All are timed alternately, and the median is taken with its quartiles.
"""

from __future__ import annotations

import argparse
import time
from statistics import quantiles
from typing import Any

import torch
from peft.tuners.lora.layer import Linear

from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.models import load_model
from pi_ray.train import lora, shared_prefix
from pi_ray.train.batches import Batch, packed_batch
from pi_ray.train.lora_linear import LoraLinear
from pi_ray.train.objectives import sft_loss
from tests.bench.report import header, last_line

CASES = {"prompt of 550 tokens": 550, "query alone": 0}  # name -> tokens before the rows
ROWS, QUERY, ANSWER = 8, 20, 18
OURS, PEER, ROUNDED = "pi-ray", "peft", "peft, rounded matrices"
LAYERS = {PEER: Linear, ROUNDED: Linear, OURS: LoraLinear}


def gradient(model: Any, batch: Batch) -> tuple[float, torch.Tensor]:
    """(seconds, gradient of all trainable weights)"""
    started = time.perf_counter()
    (sft_loss(model, batch) / (batch.labels >= 0).sum()).backward()
    seconds = time.perf_counter() - started
    return seconds, torch.cat([p.grad.flatten() for p in lora.trainable_parameters(model).values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    header("LoRA layers: pi-ray against peft")
    base = load_model(ModelConfig(base=args.model, dtype=args.dtype))
    model = lora.add_lora(base, LoraConfig(rank=args.rank, alpha=2 * args.rank), seed=0).train()
    for name, p in lora.trainable_parameters(model).items():
        if ".lora_B." in name:  # as after some updates: at zero, A would have no gradient
            torch.nn.init.normal_(p, std=0.02)
    shared_prefix.enable_shared_prefix(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    matrices = {p: p.data for p in lora.trainable_parameters(model).values()}
    random, figures = torch.Generator().manual_seed(0), dict[str, float]()

    def ids(count: int) -> list[int]:
        return torch.randint(5, 40_000, (count,), generator=random).tolist()

    for case, prompt in CASES.items():
        batch = packed_batch(ids(prompt), [(ids(QUERY), ids(ANSWER)) for _ in range(ROWS)])
        seconds: dict[str, list[float]] = {name: [] for name in LAYERS}
        grads = dict[str, torch.Tensor]()
        for turn in range(args.rounds + 1):  # the first one warms up
            for name, kind in LAYERS.items():
                for layer in layers:
                    layer.__class__ = kind
                for p, whole in matrices.items():
                    p.grad, p.data = None, whole.to(base.dtype) if name == ROUNDED else whole
                taken, grads[name] = gradient(model, batch)
                if turn:
                    seconds[name].append(taken)
        spread = {name: quantiles(taken, n=4) for name, taken in seconds.items()}
        ratios = [spread[peer][1] / spread[OURS][1] for peer in (PEER, ROUNDED)]
        apart = ((grads[OURS] - grads[PEER]).norm() / grads[PEER].norm()).item()
        print(f"  {case}: {batch.tokens} tokens, gradients {apart:.2g} of their norm apart")
        for name, (low, middle, high) in spread.items():
            print(f"    {name:22} {middle:.3f} s ({low:.3f} to {high:.3f})")
        print(f"    {OURS} is {ratios[0]:.2f} and {ratios[1]:.2f} times as fast", flush=True)
        key = "prompted" if prompt else "query_only"
        figures |= {f"{key}_speedup": ratios[0], f"{key}_speedup_rounded": ratios[1],
                    f"{key}_gradient_difference": apart}
    last_line(**figures)


if __name__ == "__main__":
    main()
