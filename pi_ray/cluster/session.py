"""A Ray cluster: joining the one named by RAY_ADDRESS, or one on this machine for as long as the command runs, and which of its nodes do what."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pi_ray.cluster import auth, requirements

SERVE = {  # Ray Serve's settings that take a quarter off what a request costs in it: replicas call each other by gRPC, and each has one event loop
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}  # fmt: skip


def connect() -> None:
    """Start or join Ray, quietly; nothing when it is already up. Token authentication stays as Ray sets it, usage statistics stay off.

    Raises ClusterError for a cluster of other machines without authentication, MissingExtraError for versions that are too old.
    """
    requirements.check()
    auth.refuse_open(os.environ.get("RAY_ADDRESS", ""))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without a GPU keep CUDA_VISIBLE_DEVICES: Ray's coming default
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray

    if ray.is_initialized():
        return
    local: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        local = {"address": "local", "include_dashboard": False}  # without an address Ray would join, or wait for, whatever cluster was last started on this machine
        os.environ.update({**SERVE, **os.environ})  # other clusters have them from cluster/
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's C++ side prints into the terminal is for Ray's developers
    with _muted("Set ray log level"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)


@contextmanager
def _muted(phrase: str) -> Iterator[None]:
    """Leave out lines with `phrase` from what is written to stderr meanwhile, by C++ too. The rest is passed on when the block ends, or fails."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            held.seek(0)
            os.write(2, b"".join(line for line in held if phrase.encode() not in line))
