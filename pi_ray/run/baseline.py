"""The baseline that is trained beside a run: plain fine-tuning, which is a schedule and needs no code of its own."""

from __future__ import annotations

from pi_ray.config import RunConfig
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases


def plain_finetuning_config(config: RunConfig) -> RunConfig:
    """Rate 0 and no shots in every phase: the run's rows, updates and learning rates, without a prompt."""
    phases = [{"rate": 0.0, "shots": 0, "epochs": p.epochs, "steps": p.steps} for p in plan_phases(config.schedule)]
    changes = {"evaluate.shots": 0, "train.objective": "sft", "train.gist": 0, "train.init_adapter": ""}
    run_dir = str(RunDir(config.root).baseline("plain").root)
    return config.replace(run_dir=run_dir, schedule={"name": "list", "list": phases}, **changes)
