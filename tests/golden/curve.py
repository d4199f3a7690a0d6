"""The losses of a tiny training run, curve.json, by which a change of what is learned shows.

    python -m tests.golden.curve

writes it again. Three phases of nine updates on a Llama of two layers, with random weights and rows made from seeds,
on one CPU thread in float32. Weights are drawn uniformly and rows need no tokenizer, so that the curve depends as
little as possible on the machine and on versions of libraries.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pi_ray.config import RunConfig
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train.dataloader import UpdateBatches
from pi_ray.train.trainer import Trainer
from pi_ray.train.updates import Update

FILE = Path(__file__).with_name("curve.json")
VOCABULARY, ROWS, PREFIX = 64, 12, 16  # PREFIX: tokens of the whole template


def write_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.uniform_(-0.2, 0.2)
    model.save_pretrained(folder)
    return folder


def write_datasets(config: RunConfig) -> None:
    """A dataset for each phase and one of dev rows; an answer is the last tokens of its query, each plus one.

    All phases have the same queries, behind a prefix and examples of their own, which shrink as in a real run.
    """
    run, phases = RunDir(config.root), plan_phases(config.schedule)
    for key, phase in [*enumerate(phases), ("dev", phases[-1])]:
        queries, context = random.Random("dev" if key == "dev" else "train"), random.Random(str(key))
        prompts, labels = [], []
        for i in range(ROWS):
            query = [queries.randrange(2, VOCABULARY - 1) for _ in range(3 + i % 4)]
            prompts.append([context.randrange(2, VOCABULARY) for _ in range(4 * phase.shots)] + query)
            labels.append([token + 1 for token in query[-1 - i % 3 :]] + [1])
        prefix = [context.randrange(2, VOCABULARY) for _ in range(2 + round(PREFIX * phase.rate))]
        tokens: dict[str, float] = {"prefix": len(prefix)}
        for name, rows in (("row", prompts), ("label", labels)):
            tokens |= {f"{name}_mean": sum(map(len, rows)) / ROWS, f"{name}_max": max(map(len, rows))}
        facts = {"phase": {"rate": phase.rate, "shots": phase.shots}, "template": "", "rows": ROWS, "tokens": tokens}
        with staged(run.phase(key), fingerprint="golden", prefix_ids=prefix, **facts) as tmp:
            pq.write_table(pa.table({"prompt_ids": prompts, "label_ids": labels}), tmp / "part-00000.parquet")


class RecordedTrainer(Trainer):
    """A trainer that keeps its losses as they are, not rounded as in the log."""

    losses: list[float]
    dev_losses: list[float]

    def forward_backward(self, update: UpdateBatches) -> torch.Tensor:
        totals = super().forward_backward(update)
        self.losses.append(totals[0].item())
        return totals

    def end_phase(self, update: Update) -> None:
        self.dev_losses.append(self.evaluate_dev(self.dev)[0])
        super().end_phase(update)


def curve(folder: Path) -> dict[str, list[float]]:
    """Train in `folder`: the loss of each update, and on dev rows after each phase, in nats a token."""
    config = RunConfig.model_validate({
        "name": "golden", "run_dir": str(folder / "run"), "model": {"base": str(write_model(folder / "model"))},
        "schedule": {"phases": 3, "shots": 2, "epochs": 3},
        "train": {
            "workers": 1, "gpu": False, "backend": {"name": "ddp"}, "batch_size": 4, "micro_batch": 2, "lr": 0.005,
            "warmup": 0.2, "weight_decay": 0.01, "lora": {"rank": 4, "alpha": 8},
        },
    })
    write_datasets(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = RecordedTrainer(config, "golden", "cpu", None)
    trainer.losses, trainer.dev_losses = [], []
    try:
        trainer.train()
    finally:
        trainer.close()
        torch.set_num_threads(threads)
    return {"loss": trainer.losses, "dev_loss": trainer.dev_losses}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        FILE.write_text(json.dumps(curve(Path(made)), indent=1) + "\n")
