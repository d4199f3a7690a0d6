"""Progressive fine-tuning on Ray Train (paper Algorithm 1, lines 8 to 12): the driver's side. worker.py is what each process does."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pi_ray.artifact import is_current, read_manifest
from pi_ray.config import RunConfig
from pi_ray.errors import TrainingError
from pi_ray.rundir import RunDir, train_fingerprint
from pi_ray.schedule import plan_phases


def fingerprint_of(config: RunConfig) -> str:
    """The train fingerprint of a prepared run. Raises TrainingError when preparation has not been done."""
    manifest = read_manifest(RunDir(config.root).phase(0))
    if manifest is None:
        raise TrainingError(f"{config.root}: nothing prepared; run 'pi-ray prepare' (or 'pi-ray run') with this run.yaml first")
    return train_fingerprint(config, manifest["fingerprint"])


def is_trained(config: RunConfig) -> bool:
    run, fingerprint = RunDir(config.root), fingerprint_of(config)
    return all(is_current(run.adapter(i), fingerprint) for i in range(len(plan_phases(config.schedule)))) and run.best.exists()


def train(config: RunConfig, watch: Callable[[dict[str, Any]], None] = lambda entry: None) -> str:
    """Train on the Ray cluster (started by the caller) and return the train fingerprint. Skipped when every adapter is there.

    `watch` gets each entry of the log as it is written. Raises TrainingError when the worker group fails for good.
    """
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    fingerprint = fingerprint_of(config)
    if is_trained(config):
        return fingerprint
    run = RunDir(config.root)
    resources = ray.cluster_resources()
    gpu = resources.get("GPU", 0) >= config.train.workers if config.train.gpu == "auto" else config.train.gpu
    cpus = resources.get("CPU", 1) / config.train.workers
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "fingerprint": fingerprint},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=300),
        scaling_config=ScalingConfig(num_workers=config.train.workers, use_gpu=bool(gpu), resources_per_worker={"CPU": int(cpus) if cpus >= 1 else cpus, **({"GPU": 1} if gpu else {})}),
        # Checkpoints are ours (hashed, free of the world size); Ray's own record of the run is scratch, with a new name every time,
        # because a damaged one would keep the run from resuming.
        run_config=RayRunConfig(name=f"{config.name}-{os.getpid()}-{int(time.time())}", storage_path=str(run.root / "ray"), failure_config=FailureConfig(max_failures=config.train.max_failures)),
    )
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(run.train_log, watch, stop), daemon=True)
    follower.start()
    try:
        trainer.fit()
    except Exception as error:
        raise TrainingError(f"training stopped: {_root_cause(error)}. What was learned up to the newest checkpoint is kept; the same command goes on from there") from error
    finally:
        stop.set()
        follower.join(timeout=5)
    shutil.rmtree(run.root / "ray", ignore_errors=True)
    return fingerprint


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from pi_ray.train.worker import train_worker

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    device = str(ray.train.torch.get_device())
    train_worker({**settings, "device": device, "report": ray.train.report})


def _follow(log: Path, watch: Callable[[dict[str, Any]], None], stop: threading.Event) -> None:
    """Hand every complete line that is added to the log to `watch` (workers on other nodes write it to shared storage)."""
    offset = 0
    while True:
        last = stop.is_set()
        size = log.stat().st_size if log.exists() else 0
        if size < offset:  # trimmed on a resume
            offset = 0
        if size > offset:
            with open(log, "rb") as f:
                f.seek(offset)
                data = f.read()
            whole = data[: data.rfind(b"\n") + 1]
            offset += len(whole)
            for line in whole.splitlines():
                watch(json.loads(line))
        if last:
            return
        stop.wait(0.5)


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    while getattr(cause, "cause", None) or cause.__cause__:
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
