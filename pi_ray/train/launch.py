"""Progressive fine-tuning on Ray Train (paper Algorithm 1, lines 8 to 12): the driver. Each worker runs trainer.py."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError, PiRayError, TrainingError
from pi_ray.models import base_digest
from pi_ray.run.artifact import is_current, read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learning_settings, train_fingerprint
from pi_ray.run.lock import run_lock
from pi_ray.schedule import plan_phases
from pi_ray.train import trackers
from pi_ray.train.floor import decide_floor
from pi_ray.train.phase_scores import best_by_metric
from pi_ray.train.train_log import LogFollower, TrainLog


def fingerprint_of(config: RunConfig) -> str:
    """The train fingerprint of a prepared run. Raises TrainingError when preparation has not been done."""
    if manifest := read_manifest(RunDir(config.root).phase(0)):
        return train_fingerprint(config, manifest["fingerprint"], base_digest(config.model))
    raise TrainingError(
        f"{config.root}: nothing prepared; run 'pi-ray prepare' (or 'pi-ray run') with this run.yaml first"
    )


def is_trained(config: RunConfig) -> bool:
    """Whether every phase has its adapter, and the best one is chosen, which depends on `schedule.floor` and
    `task.metric`.
    """
    if not _has_all_adapters(config):
        return False
    chosen = RunDir(config.root).best.name
    if config.schedule.floor:
        return chosen == f"phase-{decide_floor(config).chosen}"
    return not config.training_metric or chosen == f"phase-{best_by_metric(config).phase}"


def _has_all_adapters(config: RunConfig) -> bool:
    run, fingerprint, phases = RunDir(config.root), fingerprint_of(config), len(plan_phases(config.schedule))
    return all(is_current(run.adapter(i), fingerprint) for i in range(phases)) and run.best.exists()


def train(config: RunConfig, watch: Callable[[dict[str, Any]], None] = lambda entry: None) -> str:
    """Train on the Ray cluster, unless it is done; returns the train fingerprint.

    `watch` gets each log entry as it is written. Raises TrainingError when the worker group fails for good, and
    pi-ray's own errors in a worker (data, settings, disk) at once, since another try would end the same, and
    StorageError while another process has the run directory's lock.
    """
    fingerprint = fingerprint_of(config)
    with run_lock(config.root, "is training this run"):
        return _train(config, fingerprint, watch)


def _train(config: RunConfig, fingerprint: str, watch: Callable[[dict[str, Any]], None]) -> str:
    if is_trained(config):
        return fingerprint
    if _has_all_adapters(config):
        _choose_again(config, watch)
        return fingerprint
    if config.model.dtype == "float16":
        raise ConfigError(
            "model.dtype: float16 is for evaluation and serving: training in it would need its losses scaled; "
            "take bfloat16, or auto"
        )

    from pi_ray.train import checkpoint, teacher_workers

    session.connect()
    run = RunDir(config.root)
    trackers.require_tracker(config.train.tracker)
    # before a worker starts, so that a refused or damaged checkpoint is reported at once
    checkpoint.newest_checkpoint(
        run.checkpoints, fingerprint, learning_settings(config, base_digest(config.model)),
        lambda text: watch({"event": "warning", "text": text}),
    )
    log = LogFollower(run.train_log)
    while not _has_all_adapters(config):
        if teacher_workers.is_due(config, fingerprint):
            found = checkpoint.list_checkpoints(run.checkpoints)
            step = int(found[0].name.removeprefix("step-")) if found else 0
            teacher_workers.answer_in_actors(config, fingerprint, step, watch)
        _fit(config, fingerprint, watch, log)
        if not (_has_all_adapters(config) or teacher_workers.is_due(config, fingerprint)):
            raise TrainingError("training ended before its last update; the same command goes on from the checkpoint")
    return fingerprint


def _fit(config: RunConfig, fingerprint: str, watch: Callable[[dict[str, Any]], None], log: LogFollower) -> None:
    """One group of training workers, to the last update or to where a teacher has to answer outside of it."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    run = RunDir(config.root)
    scaling, sync = placement.training_scaling(config, placement.cluster_nodes()), storage_sync.sync_for(run.root)
    _forget_best(run, sync)
    collectives = TorchConfig("nccl" if scaling["use_gpu"] else "gloo", timeout_s=config.train.collective_timeout_s)
    trainer = TorchTrainer(
        _ray_worker, torch_config=collectives, scaling_config=ScalingConfig(**scaling),
        train_loop_config={"config": config.model_dump(mode="json"), "fingerprint": fingerprint, "sync": sync},
        # Checkpoints are pi-ray's (hashed, free of the world size). Ray's record of the run gets a new name each time
        # and is removed, because a damaged one would keep the run from resuming.
        run_config=RayRunConfig(
            name=f"{config.name}-{os.getpid()}-{int(time.time())}",
            storage_path=f"{sync.storage.url}/ray" if sync else str(run.root / "ray"),
            failure_config=FailureConfig(max_failures=config.train.max_failures), callbacks=[_stop_at_own_errors()],
        ),
    )
    stop, on_interrupt = threading.Event(), signal.getsignal(signal.SIGINT)
    follower = threading.Thread(target=_follow, args=(log, watch, stop), daemon=True)
    follower.start()
    try:
        with _ray_timeouts(config.train.collective_timeout_s):
            trainer.fit()
    except (KeyboardInterrupt, SystemExit):  # at Ctrl-C Ray ends the process, as if all were done
        raise KeyboardInterrupt(_describe_kept(run)) from None
    except Exception as error:
        cause = _root_cause(error)
        if isinstance(cause, PiRayError):
            raise cause from error
        last_line = [type(cause).__name__, *filter(None, map(str.strip, str(cause).splitlines()))][-1]
        raise TrainingError(
            f"training stopped: {last_line}. "
            "What was learned up to the newest checkpoint is kept; the same command goes on from there"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Ray's handler would stay
        stop.set()
        follower.join(timeout=5)
    if sync:
        sync.pull()
        sync.delete("ray")
    shutil.rmtree(run.root / "ray", ignore_errors=True)


def _describe_kept(run: RunDir) -> str:
    """The state that an interrupted training leaves for the next one."""
    from pi_ray.train import checkpoint

    if found := checkpoint.list_checkpoints(run.checkpoints):
        return f"all that was learned in the first {int(found[0].name.removeprefix('step-'))} updates is kept"
    return "what was prepared is kept, and no checkpoint was written yet, so that training begins anew"


def _choose_again(config: RunConfig, watch: Callable[[dict[str, Any]], None]) -> None:
    """Choose the adapter that another `schedule.floor` or `task.metric` chooses, without training."""
    from pi_ray.train.lora import choose_best_adapter

    run, sync = RunDir(config.root), storage_sync.sync_for(config.root)
    entry = {"event": "best", **choose_best_adapter(config)}
    TrainLog(run.train_log).add(entry)
    watch(entry)
    if sync:
        sync.push_changes()


def _forget_best(run: RunDir, sync: storage_sync.StorageSync | None) -> None:
    """Remove the choice of an earlier training, by which `is_trained` would take this one for done too early."""
    if run.best_file.exists():
        run.best_file.unlink()
        if sync:
            sync.push_changes()


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import torch

    from pi_ray.models.device import training_device
    from pi_ray.train.trainer import train_worker

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    sync, train = settings.pop("sync"), RunConfig.model_validate(settings["config"]).train
    world, given = ray.train.get_context().get_world_size(), str(ray.train.torch.get_device())
    device = training_device(given, world, train.backend.name, train.gpu)
    if sync:
        sync.attach_worker()
    train_worker({**settings, "device": device, "report": ray.train.report})
    if sync and ray.train.get_context().get_world_rank() == 0:
        sync.push_changes()


def _stop_at_own_errors() -> Any:
    """A callback that ends the run at an error of pi-ray's own, such as broken rows, a full disk or a NaN loss."""
    from ray.train import UserCallback

    class StopAtOwnErrors(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, PiRayError):
                    raise error

    return StopAtOwnErrors()


@contextmanager
def _ray_timeouts(seconds: int) -> Iterator[None]:
    """Set how long Ray waits for a worker, at its barriers and health checks; Ray reads both when a run starts."""
    health = max(60, seconds)  # a worker that loads a model may not answer
    wanted = {"RAY_TRAIN_COLLECTIVE_TIMEOUT_S": seconds, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": health}
    added = {key: str(value) for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


def _follow(log: LogFollower, watch: Callable[[dict[str, Any]], None], stop: threading.Event) -> None:
    """Pass entries of the log to `watch` as they come. Workers elsewhere write it to shared storage."""
    last = False
    while not last:
        last = stop.wait(0.5)
        for entry in log.new_entries():
            watch(entry)


def _root_cause(error: BaseException) -> BaseException:
    """The first error under Ray's wrappers."""
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else getattr(error, "controller_failure", error)
    while not isinstance(cause, PiRayError):
        inner = getattr(cause, "cause", None) or getattr(cause, "controller_failure", None) or cause.__cause__
        if not inner:
            break
        cause = inner
    return cause
