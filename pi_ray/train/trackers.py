"""Experiment trackers: TensorBoard, Weights & Biases or MLflow (`train.tracker`) get what the training log gets.

The first worker alone talks to them. All three write into the run directory unless the user's environment says
otherwise, so nothing leaves the machine that its owner did not send off.
"""

from __future__ import annotations

import json
import netrc
import os
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from pi_ray.config import RunConfig
from pi_ray.errors import MissingExtraError
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learning_settings

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
WANDB_HOST = "https://api.wandb.ai"


class Tracker:
    """Takes entries of the training log and sends numbers by update, and phases as notes."""

    phase = -1

    def scalars(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def note(self, key: str, text: str, step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def add(self, entry: dict[str, Any]) -> None:
        step = entry.get("step", 0)
        if "loss" in entry:
            if entry["phase"] != self.phase:
                self.phase = entry["phase"]
                self.note("phase", f"phase {self.phase} begins at update {step}", step)
            self.scalars({
                "train/loss": entry["loss"], "train/lr": entry["lr"], "train/phase": entry["phase"],
                "train/tokens_per_s": entry["tokens"] / max(entry["seconds"], 1e-9),
                "train/tokens_saved": 1 - entry["tokens"] / entry["plain_tokens"],
            }, step)
        elif "dev_loss" in entry:
            self.scalars({"dev/loss": entry["dev_loss"], "dev/accuracy": entry["dev_accuracy"]}, step)
        elif entry.get("event") == "best":
            self.note("best", f"phase {entry['phase']}, dev accuracy {entry['dev_accuracy']:.4f}", step)


def require_tracker(name: str) -> None:
    """Raises MissingExtraError when the package of this tracker is not installed."""
    if name and find_spec(PACKAGES[name]) is None:
        raise MissingExtraError(
            f"train.tracker: {name} needs the package {PACKAGES[name]}; "
            f"install it on every node with: pip install {PACKAGES[name]}"
        )


def open_tracker(config: RunConfig, run: RunDir, done: int) -> Tracker | None:
    """The tracker of `train.tracker`, going on after `done` updates; None where none is wanted."""
    name = config.train.tracker
    if not name:
        return None
    require_tracker(name)
    return {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MlFlow}[name](config, run, done)


class _TensorBoard(Tracker):
    """Event files under tensorboard/, to be seen with `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, config: RunConfig, run: RunDir, done: int):
        from tensorboardX import SummaryWriter

        # purge_step: updates that are done again after a restart are shown once
        self.writer = SummaryWriter(str(run.root / "tensorboard"), purge_step=done, flush_secs=10)
        self.note("config", json.dumps(learning_settings(config), indent=1), done)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def note(self, key: str, text: str, step: int) -> None:
        self.writer.add_text(key, text, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb(Tracker):
    """A run of the project "pi-ray", the same after a restart. Offline, under wandb/, without a login or WANDB_MODE."""

    def __init__(self, config: RunConfig, run: RunDir, done: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "pi-ray", name=config.name,
            id=_run_id(run, "wandb", os.urandom(8).hex()), resume="allow", dir=str(run.root),
            mode=os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline"),
            config=learning_settings(config),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def note(self, key: str, text: str, step: int) -> None:
        self.run.summary[f"{key}/{step}"] = text

    def close(self) -> None:
        self.run.finish()


class _MlFlow(Tracker):
    """A run of the experiment "pi-ray", the same after a restart: in RUN/mlflow.db, or at MLFLOW_TRACKING_URI."""

    def __init__(self, config: RunConfig, run: RunDir, done: int):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{run.root.resolve() / 'mlflow.db'}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or "pi-ray")
        self.mlflow, known = mlflow, _run_id(run, "mlflow")
        started = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=config.name)
        if not known:
            _run_id(run, "mlflow", started.info.run_id)
            mlflow.log_params({key: str(value)[:500] for key, value in learning_settings(config).items()})

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics({key.replace("/", "_"): value for key, value in values.items()}, step=step)

    def note(self, key: str, text: str, step: int) -> None:
        self.mlflow.set_tag(f"{key}_{step}", text)

    def close(self) -> None:
        self.mlflow.end_run()


def logged_in() -> bool:
    """Whether the user has given W&B's client a key, by WANDB_API_KEY or `wandb login`. The key itself is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB_HOST).hostname or ""
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run: RunDir, tracker: str, new: str = "") -> str:
    """The tracker's id of this run, by which a restart goes on with it; `new` is noted where there is none yet."""
    path = run.root / "tracker.json"
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    if tracker not in known and new:
        known[tracker] = new
        write_atomic(path, json.dumps(known) + "\n")
    return known.get(tracker, "")
