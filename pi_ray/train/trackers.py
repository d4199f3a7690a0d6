"""Experiment trackers: TensorBoard, Weights & Biases or MLflow (`train.tracker`) get what the training log gets.

The first worker alone talks to them. All three write into the run directory unless the user's environment says
otherwise, so nothing leaves the machine that its owner did not send off.
"""

import json
import netrc
import os
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass
class Tracker:
    """Takes entries of the training log and sends numbers by update, and phases as notes."""

    scalars: Callable[[dict[str, float], int], Any]  # (values, step)
    note: Callable[[str, str, int], Any]  # (key, text, step)
    close: Callable[[], Any]
    phase: int = -1

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
            scores = {f"dev/{name}": mean for name, mean in entry.get("scores", {}).items()}
            self.scalars({"dev/loss": entry["dev_loss"], "dev/accuracy": entry["dev_accuracy"], **scores}, step)
        elif entry.get("event") == "best":
            if "floor" in entry:
                why = entry["floor"]["sentence"]
            else:
                score = f"dev {entry['metric']} {entry['score']:.4f}, " if "metric" in entry else ""
                why = f"{score}dev accuracy {entry['dev_accuracy']:.4f}"
            self.note("best", f"phase {entry['phase']}, {why}", step)


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
    return {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[name](config, run, done)


def _tensorboard(config: RunConfig, run: RunDir, done: int) -> Tracker:
    """Event files under tensorboard/, to be seen with `tensorboard --logdir RUN/tensorboard`."""
    from tensorboardX import SummaryWriter

    # purge_step: updates that are done again after a restart are shown once
    writer = SummaryWriter(str(run.root / "tensorboard"), purge_step=done, flush_secs=10)
    writer.add_text("config", json.dumps(learning_settings(config), indent=1), done)

    def scalars(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Tracker(scalars, writer.add_text, writer.close)


def _wandb(config: RunConfig, run: RunDir, done: int) -> Tracker:
    """A run of the project "pi-ray", the same after a restart. Offline, under wandb/, without a login or WANDB_MODE."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "pi-ray", name=config.name, dir=str(run.root), resume="allow",
        id=_run_id(run, "wandb", os.urandom(8).hex()), config=learning_settings(config),
        mode=os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline"),
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
    )

    def note(key: str, text: str, step: int) -> None:
        tracked.summary[f"{key}/{step}"] = text

    return Tracker(tracked.log, note, tracked.finish)


def _mlflow(config: RunConfig, run: RunDir, done: int) -> Tracker:
    """A run of the experiment "pi-ray", the same after a restart: in RUN/mlflow.db, or at MLFLOW_TRACKING_URI."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{run.root.resolve() / 'mlflow.db'}")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or "pi-ray")
    if known := _run_id(run, "mlflow"):
        mlflow.start_run(run_id=known)
    else:
        _run_id(run, "mlflow", mlflow.start_run(run_name=config.name).info.run_id)
        mlflow.log_params({key: str(value)[:500] for key, value in learning_settings(config).items()})

    def scalars(values: dict[str, float], step: int) -> None:
        mlflow.log_metrics({key.replace("/", "_"): value for key, value in values.items()}, step=step)

    def note(key: str, text: str, step: int) -> None:
        mlflow.set_tag(f"{key}_{step}", text)

    return Tracker(scalars, note, mlflow.end_run)


def _logged_in() -> bool:
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
