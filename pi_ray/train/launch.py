"""Progressive fine-tuning on Ray Train (paper Algorithm 1, lines 8 to 12): the driver's side. worker.py is what each process does."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.cluster import placement, storage_sync
from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError, PiRayError, TrainingError
from pi_ray.run.artifact import is_current, read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learned_from, train_fingerprint
from pi_ray.schedule import plan_phases
from pi_ray.train import trackers
from pi_ray.train.train_log import entries


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

    `watch` gets each entry of the log as it is written. Raises TrainingError when the worker group fails for good, and what a worker found wrong
    with data, settings or disk at once, since another try would end the same.
    """
    fingerprint = fingerprint_of(config)
    if is_trained(config):
        return fingerprint
    if config.model.dtype == "float16":
        raise ConfigError("model.dtype: float16 is for evaluation and serving: training in it would need its losses scaled; take bfloat16, or auto")

    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pi_ray.train import checkpoint

    run = RunDir(config.root)
    trackers.need(config.train.tracker)
    # here, before a worker starts: a checkpoint of another configuration is refused, and a damaged one told to the person who waits
    checkpoint.newest(run.checkpoints, fingerprint, learned_from(config), lambda text: watch({"event": "warning", "text": text}))
    gang, elsewhere = placement.training_scaling(config, placement.cluster_nodes()), storage_sync.of(run.root)
    _forget_best(run, elsewhere)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "fingerprint": fingerprint, "mirror": elsewhere},
        torch_config=TorchConfig(backend="nccl" if gang["use_gpu"] else "gloo", timeout_s=config.train.collective_timeout_s),
        scaling_config=ScalingConfig(**gang),
        # Checkpoints are ours (hashed, free of the world size); Ray's own record of the run is scratch, with a new name every time,
        # because a damaged one would keep the run from resuming.
        run_config=RayRunConfig(
            name=f"{config.name}-{os.getpid()}-{int(time.time())}", storage_path=f"{elsewhere.there.url}/ray" if elsewhere else str(run.root / "ray"),
            failure_config=FailureConfig(max_failures=config.train.max_failures), callbacks=[_give_up()],
        ),
    )
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(run.train_log, watch, stop), daemon=True)
    follower.start()
    try:
        with _timeouts(config.train.collective_timeout_s):
            trainer.fit()
    except Exception as error:
        cause = _root(error)
        if isinstance(cause, PiRayError):
            raise cause from error
        raise TrainingError(f"training stopped: {_said(cause)}. What was learned up to the newest checkpoint is kept; the same command goes on from there") from error
    finally:
        stop.set()
        follower.join(timeout=5)
    if elsewhere:
        elsewhere.pull()
        elsewhere.drop("ray")
    shutil.rmtree(run.root / "ray", ignore_errors=True)
    return fingerprint


def _forget_best(run: RunDir, elsewhere: storage_sync.Mirror | None) -> None:
    """Remove the mark of settings of before, which `is_trained` would take for this training's if it was killed after its last adapter and before its own mark."""
    if run.best.is_symlink():
        run.best.unlink()
        if elsewhere:
            elsewhere.save()


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from pi_ray.train.trainer import train_worker

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    device, elsewhere = str(ray.train.torch.get_device()), settings.pop("mirror")
    if elsewhere:
        elsewhere.join()
    train_worker({**settings, "device": device, "report": ray.train.report})
    if elsewhere and ray.train.get_context().get_world_rank() == 0:
        elsewhere.save()


def _give_up() -> Any:
    """A callback of Ray's controller that ends the run at an error which another try would only repeat: broken rows, a full disk, a loss that is no number."""
    from ray.train import UserCallback

    class GiveUp(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, PiRayError):
                    raise error

    return GiveUp()


@contextmanager
def _timeouts(seconds: int) -> Iterator[None]:
    """Let Ray, too, take a worker for lost that does not answer: at its own barriers, and where no other worker waits for it. Ray reads both when a run starts."""
    own = {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": seconds, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": max(60, seconds)}  # loading a model may keep a worker from answering for a while
    added = {key: str(value) for key, value in own.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


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
            for entry in entries(whole):
                watch(entry)
        if last:
            return
        stop.wait(0.5)


def _root(error: BaseException) -> BaseException:
    """What began it, under Ray's wrappers."""
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else getattr(error, "controller_failure", error)
    while not isinstance(cause, PiRayError) and (inner := getattr(cause, "cause", None) or getattr(cause, "controller_failure", None) or cause.__cause__):
        cause = inner
    return cause


def _said(cause: BaseException) -> str:
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
