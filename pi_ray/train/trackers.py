"""Where others watch: TensorBoard, Weights & Biases or MLflow get what the training log gets. `train.tracker` names one; the first worker alone talks to it.

All three write into the run directory unless the user's environment says otherwise, so nothing leaves the machine that its owner did not send off.
"""

from __future__ import annotations

import json
import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pi_ray.config import RunConfig
from pi_ray.errors import MissingExtraError
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learned_from

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
WANDB_HOST = "https://api.wandb.ai"


class Writer(Protocol):
    """What each of the three is reduced to."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def note(self, key: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Takes entries of the training log and sends numbers by update, and phases as notes."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self.phase = -1

    def take(self, entry: dict[str, Any]) -> None:
        if "loss" in entry:
            self._update(entry)
        elif "dev_loss" in entry:
            self.writer.scalars({"dev/loss": entry["dev_loss"], "dev/accuracy": entry["dev_accuracy"]}, entry["step"])
        if entry.get("event") == "best":
            self.writer.note("best", f"phase {entry['phase']}, dev accuracy {entry['dev_accuracy']:.4f}", entry["step"])

    def _update(self, entry: dict[str, Any]) -> None:
        if entry["phase"] != self.phase:
            self.phase = entry["phase"]
            self.writer.note("phase", f"phase {self.phase} begins at update {entry['step']}", entry["step"])
        values = {"train/loss": entry["loss"], "train/lr": entry["lr"], "train/phase": entry["phase"], "train/tokens_per_s": entry["tokens"] / max(entry["seconds"], 1e-9)}
        self.writer.scalars({**values, "train/tokens_saved": 1 - entry["tokens"] / entry["plain_tokens"]}, entry["step"])

    def close(self) -> None:
        self.writer.close()


def need(name: str) -> None:
    """Raises MissingExtraError when the package of this tracker is not installed."""
    if name and find_spec(PACKAGES[name]) is None:
        raise MissingExtraError(f"train.tracker: {name} needs the package {PACKAGES[name]}; install it on every node with: pip install {PACKAGES[name]}")


def open_tracker(config: RunConfig, run: RunDir, done: int) -> Tracker | None:
    """The tracker of `train.tracker`, going on after `done` updates; None for none."""
    name = config.train.tracker
    if not name:
        return None
    need(name)
    return Tracker({"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MlFlow}[name](config, run, done))


class _TensorBoard:
    """Event files under tensorboard/. Looked at with `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, config: RunConfig, run: RunDir, done: int):
        from tensorboardX import SummaryWriter

        # purge_step: what was written of updates that are done again is not shown twice
        self.to = SummaryWriter(str(run.root / "tensorboard"), purge_step=done, flush_secs=10)
        self.note("config", json.dumps(learned_from(config), indent=1), done)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.to.add_scalar(key, value, step)

    def note(self, key: str, text: str, step: int) -> None:
        self.to.add_text(key, text, step)

    def close(self) -> None:
        self.to.close()


class _Wandb:
    """A run of the project "pi-ray", the same one after a restart. Offline, under wandb/, unless the user has logged in or set WANDB_MODE."""

    def __init__(self, config: RunConfig, run: RunDir, done: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, silent=True)
        self.to = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "pi-ray", name=config.name, id=_remembered(run, "wandb", os.urandom(8).hex()), resume="allow",
            dir=str(run.root), mode=mode, config=learned_from(config), settings=settings,
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.to.log(values, step=step)

    def note(self, key: str, text: str, step: int) -> None:
        self.to.summary[f"{key}/{step}"] = text

    def close(self) -> None:
        self.to.finish()


class _MlFlow:
    """A run of the experiment "pi-ray", the same one after a restart: in mlflow.db of the run directory, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, config: RunConfig, run: RunDir, done: int):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{run.root.resolve() / 'mlflow.db'}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or "pi-ray")
        self.to, known = mlflow, _remembered(run, "mlflow")
        found = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=config.name)
        if not known:
            _remembered(run, "mlflow", found.info.run_id)
            mlflow.log_params({key: str(value)[:500] for key, value in learned_from(config).items()})

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.to.log_metrics({key.replace("/", "_"): value for key, value in values.items()}, step=step)

    def note(self, key: str, text: str, step: int) -> None:
        self.to.set_tag(f"{key}_{step}", text)

    def close(self) -> None:
        self.to.end_run()


def logged_in() -> bool:
    """Whether the user has given W&B's client a key, in the environment or with `wandb login`. The key itself is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB_HOST).hostname or ""
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _remembered(run: RunDir, tracker: str, new: str = "") -> str:
    """The id by which a tracker knows this run, so that a restart goes on with it. `new` is noted where there is none yet."""
    path: Path = run.root / "tracker.json"
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    if tracker not in known and new:
        known[tracker] = new
        write_atomic(path, json.dumps(known) + "\n")
    return known.get(tracker, "")
