"""A prepared run directory of a few rows, written by hand, so that tests of training need no preparation."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.row_store import write_rows
from pi_ray.schedule import plan_phases

TEMPLATE = "Translate a colour into its code. red is k4, blue is z9, green is q1, black is b7."
LISTED = "Translate a colour into its code.\n\n## Colours\n\nred: k4\nblue: z9\ngreen: q1\nblack: b7"
COLOURS = {"red": "k4", "blue": "z9", "green": "q1", "black": "b7"}


def tiny_config(model: Path, root: Path, **changes) -> RunConfig:
    """Three phases, one worker, rank 4, batches of 4, a checkpoint every 2 updates."""
    settings = {
        "name": "tiny", "run_dir": str(root), "model": {"base": str(model)}, "prompt": {"chat": "chatml"},
        "schedule": {"phases": 3, "shots": 2, "epochs": 1},
        "train": {
            "workers": 1, "batch_size": 4, "lr": 0.01, "lora": {"rank": 4, "alpha": 8}, "checkpoint_every": 2,
            "backend": {"name": "ddp"},
        },
    }
    return RunConfig.model_validate(settings).replace(**changes)


def label_text(number: int, colour: str) -> str:
    return f"{COLOURS[colour]} ." if number % 3 else COLOURS[colour]


def prepare_by_hand(config: RunConfig, rows: int = 12, whole: str = TEMPLATE) -> None:
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    run, names = RunDir(config.root), list(COLOURS)
    run.rows.mkdir(parents=True, exist_ok=True)
    pairs = [(f"case {i}: what is {names[i % 4]}?", label_text(i, names[i % 4])) for i in range(rows)]
    for split in ("train", "dev"):
        write_rows(run.rows_of(split).path, [Row(f"{split}-{i}", *pair) for i, pair in enumerate(pairs)])
    if wants_unlabelled(config):
        write_rows(run.rows_of(UNLABELLED).path, [Row(f"{UNLABELLED}-{i}", q, "") for i, (q, _) in enumerate(pairs)])
    phases = list(enumerate(plan_phases(config.schedule)))
    unlabelled = [(f"{UNLABELLED}-{i}", phase) for i, phase in phases] if wants_unlabelled(config) else []
    early = [(f"dev-{i}", phase) for i, phase in phases] if config.train.early_stop else []
    for key, phase in [*phases, *unlabelled, ("dev", phases[-1][1]), *early]:
        template = whole[: int(len(whole) * phase.rate)]
        table = {"id": [], "prompt_ids": [], "label_ids": []}
        for i in range(rows):
            name = names[i % 4]
            shots = [Example(f"code of {n}", COLOURS[n]) for n in names if n != name][: phase.shots]
            table["id"].append(f"train-{i}")
            query, answer = pairs[i]
            table["prompt_ids"].append(encoder.row(query, shots))
            table["label_ids"].append([] if str(key).startswith(UNLABELLED) else encoder.answer(answer))
        prompts, labels = table["prompt_ids"], table["label_ids"]
        tokens = {
            "prefix": len(encoder.prefix(template)),
            "row_mean": sum(map(len, prompts)) / rows, "row_max": max(map(len, prompts)),
            "label_mean": sum(map(len, labels)) / rows, "label_max": max(map(len, labels)),
        }
        facts = {
            "phase": {"rate": phase.rate, "shots": phase.shots}, "template": template,
            "prefix_ids": encoder.prefix(template), "rows": rows, "tokens": tokens,
        }
        with staged(run.phase(key), fingerprint="by-hand", **facts) as tmp:
            pq.write_table(pa.table(table), tmp / "part-00000.parquet")
