"""Joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine for as long as the command runs."""

import ipaddress
import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from pi_ray.cluster import auth, haproxy, requirements
from pi_ray.errors import ClusterError

# Ray Serve's settings that take a quarter off a request's overhead: replicas call each other by gRPC, with one event
# loop each; and the limits of connections. They are set for clusters that pi-ray starts; the files of cluster/ set them
# for others.
SERVE = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pi_ray.serve.http.connections:limit_connections",
}

# A machine of one's own is not taken back at short notice; the process that would watch for it is spared.
TRAIN = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def connect() -> None:
    """Start or join Ray, quietly, unless it is up.

    Raises ClusterError (no authentication, a Ray of this process that the network would see) and MissingExtraError.
    """
    requirements.check_requirements()
    auth.secure_session(os.environ.get("RAY_ADDRESS", ""))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without a GPU keep CUDA_VISIBLE_DEVICES
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray

    if ray.is_initialized():
        return
    local: dict[str, Any] = {}
    named = os.environ.get("RAY_ADDRESS", "")
    address: AbstractContextManager[None] = nullcontext()
    if named in ("", "local"):
        # Without an address Ray would join, or wait for, whatever cluster was last started on this machine.
        local, address = {"address": "local", "include_dashboard": False}, _on_loopback()
        # the log level is of Ray's C++ code, whose logs are for its makers
        quiet = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
        os.environ.update({**SERVE, **TRAIN, **quiet, **haproxy.start_variables(), **os.environ})
    elif _is_on_loopback_alone(named):
        address = _on_loopback()
    with address, _muted("Set ray log level"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def _is_on_loopback_alone(address: str) -> bool:
    """Whether HOST:PORT answers at this machine's loopback address and nowhere else, as a node of `_on_loopback` does.

    Ray takes 127.0.0.1 for the machine's address on the network, where it would wait for such a head in vain.
    """
    import ray

    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and auth.is_loopback(f"ray://{address}")):
        return False
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        with suppress(OSError), socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=1):
            return False
        return True
    return False


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a node that `ray.init` starts have the loopback address, so that its metrics are not shown to the network;
    and let it join such a node.

    Ray has this switch for desktops, where it is on, and reads its environment variable when it is imported. It is no
    part of Ray's interface, so what it did is checked. Raises ClusterError where it is gone or did nothing.
    """
    import ray
    from ray._private import ray_constants

    cure = (
        f"Ray {ray.__version__} does not bind a node to the loopback address, so the network would see its metrics. "
        "Start it yourself with 'ray start --head --node-ip-address=127.0.0.1' and set RAY_ADDRESS=127.0.0.1:6379"
    )
    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    if before is None:
        raise ClusterError(cure)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
        if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
            ray.shutdown()
            raise ClusterError(cure)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _muted(phrase: str) -> Iterator[None]:
    """Hold back what this process, C++ code included, writes to stderr; at the end drop lines with `phrase`."""
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
