"""Training in bfloat16 against float32 on this CPU: the bundled task behind its whole prompt, equal rows and updates.

    python -m tests.bench.dtype [--updates 60] [--seeds 2] [--model smollm2-135m]

Why `model.dtype: auto` takes bfloat16 on CPUs with AMX, and on AMD's with avx512_bf16, and float32 on Intel's without
AMX. Both sides start from the same adapter and take turns, an update each; weights and moments of the adapter are
float32 on both. Each side then scores the dev rows.
Last line: `speedup` is the median seconds of a float32 update over those of a bfloat16 one, `dev_loss_*` the mean loss
in nats a token over the seeds.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch

from pi_ray.config import LoraConfig, ModelConfig, PromptConfig, TaskConfig
from pi_ray.models import load_model, load_tokenizer, model_dtype
from pi_ray.prompt import PromptEncoder
from pi_ray.tasks.opsql.task import OpsqlTask
from pi_ray.train import lora, shared_prefix
from pi_ray.train.batches import TokenRow, packed_batch
from pi_ray.train.objectives import loss_and_correct, sft_loss
from tests.bench.report import header, last_line

ROWS, LR, CLIP = 8, 1e-3, 1.0  # of an update, as in the demo
PROMPT = PromptConfig(chat="none", query="Request: {query}\nOpsQL:")


@dataclass
class Side:
    """A model of one dtype in training, with the seconds of each update and the dev loss of each seed."""

    dtype: str
    base: str
    model: Any = None
    optimizer: Any = None
    seconds: list[float] = field(default_factory=list)
    dev_losses: list[float] = field(default_factory=list)

    def start(self, seed: int) -> None:
        """The base model with a fresh adapter."""
        base = load_model(ModelConfig(base=self.base, dtype=self.dtype), "cpu")
        self.model = lora.add_lora(base, LoraConfig(), seed=seed).train()
        shared_prefix.enable_shared_prefix(self.model.get_base_model())
        self.optimizer = torch.optim.AdamW(lora.trainable_parameters(self.model).values(), lr=LR, weight_decay=0.0)

    def update(self, prefix: list[int], rows: list[TokenRow]) -> None:
        started = time.perf_counter()
        batch = packed_batch(prefix, rows)
        (sft_loss(self.model, batch) / len(batch.labels)).backward()
        torch.nn.utils.clip_grad_norm_(lora.trainable_parameters(self.model).values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def score(self, prefix: list[int], rows: list[TokenRow]) -> None:
        self.model.eval()
        parts = [packed_batch(prefix, rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
        self.dev_losses.append(
            sum(loss_and_correct(self.model, part)[0] for part in parts) / sum(len(part.labels) for part in parts)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    header(f"bfloat16 against float32 on a CPU, {args.model}, LoRA rank 32, {ROWS} rows an update")
    auto = str(model_dtype(ModelConfig(base=args.model))).removeprefix("torch.")
    print(f"  model.dtype: auto is {auto} here", flush=True)
    task = OpsqlTask(TaskConfig(name="opsql", rows={"train": 240, "dev": 60}))
    encoder = PromptEncoder(load_tokenizer(ModelConfig(base=args.model)), PROMPT)
    prefix = encoder.prefix(task.template().text)
    train, dev = ([(encoder.row(r.query), encoder.answer(r.answer)) for r in task.rows(s)] for s in ("train", "dev"))
    sides = [Side("float32", args.model), Side("bfloat16", args.model)]
    for seed in range(args.seeds):
        for side in sides:
            side.start(seed)
        order = random.Random(seed)
        for _ in range(args.updates):
            rows = order.sample(train, ROWS)
            for side in sides:
                side.update(prefix, rows)
        for side in sides:
            side.score(prefix, dev)
        losses = ", ".join(f"{side.dtype} {side.dev_losses[-1]:.4f}" for side in sides)
        print(f"  seed {seed}, dev loss after {args.updates} updates: {losses}", flush=True)
    for side in sides:
        spread = f"{min(side.seconds):.2f} to {max(side.seconds):.2f}"
        print(f"  {side.dtype:9} median {median(side.seconds):.2f} s an update ({spread})")
    speedup = median(sides[0].seconds) / median(sides[1].seconds)
    last_line(speedup=speedup, **{f"dev_loss_{side.dtype}": fmean(side.dev_losses) for side in sides})


if __name__ == "__main__":
    main()
