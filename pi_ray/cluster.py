"""Joining a Ray cluster: the one named by RAY_ADDRESS, or one on this machine for as long as the command runs."""

from __future__ import annotations

import logging
import os
import warnings


def connect() -> None:
    """Start or join Ray, quietly; nothing when it is already up. Token authentication stays as Ray sets it, usage statistics stay off."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without a GPU keep CUDA_VISIBLE_DEVICES: Ray's coming default
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray

    if ray.is_initialized():
        return
    local: dict[str, bool] = {}
    if not os.environ.get("RAY_ADDRESS"):
        local = {"include_dashboard": False}
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's C++ side prints into the terminal is for Ray's developers
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
