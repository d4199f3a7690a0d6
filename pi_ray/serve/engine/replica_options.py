"""Ray Serve's options of the replicas that hold or front an engine: queues, autoscaling, resources, health checks."""

from __future__ import annotations

import inspect
from typing import Any

from pi_ray.config import ServeConfig

HEALTH_PERIOD_S = 2  # Serve replaces a replica after three failures in a row


def replica_options(limits: ServeConfig, has: dict[str, float], asked: dict[str, Any]) -> dict[str, Any]:
    """Serve's options for replicas that hold the base model, on a cluster that `has` so many CPU and GPU: a GPU for each replica where there are any.

    `asked` are Ray's actor options that run.yaml asks for.
    """
    scarce = has.get("GPU") or has.get("CPU", 0)
    return {
        "max_ongoing_requests": limits.max_ongoing_requests,
        "max_queued_requests": limits.max_queued_requests,
        "autoscaling_config": {
            "min_replicas": limits.min_replicas,
            "initial_replicas": max(1, limits.min_replicas),  # one starts even where none may be left: a model that cannot load fails the deployment
            "max_replicas": limits.max_replicas,
            "target_ongoing_requests": limits.max_ongoing_requests * 0.75,
            "upscale_delay_s": limits.upscale_delay_s,
            "downscale_delay_s": limits.downscale_delay_s,
            "downscale_to_zero_delay_s": limits.downscale_to_zero_delay_s,
            "look_back_period_s": 15,
        },
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(has.get("GPU", 0) > 0), **asked},
        # A new version comes up beside the old one, which serves until then; where there is no room for both, the old one must go first.
        **surge_options(100 if scarce > limits.max_replicas else 0),
        **care_options(limits),
    }


def front_options(limits: ServeConfig) -> dict[str, Any]:
    """For Model in front of an engine with a deployment of its own: one light replica checks and tokenises for all of them."""
    return {
        "num_replicas": 1,
        "max_ongoing_requests": limits.max_ongoing_requests * limits.max_replicas,
        "max_queued_requests": limits.max_queued_requests,
        "ray_actor_options": {"num_cpus": 1},
        **surge_options(100),
        **care_options(limits),
    }


def care_options(limits: ServeConfig) -> dict[str, Any]:
    """Serve replaces a replica that does not answer its health check, and lets one that has to go finish what it has begun."""
    return {"health_check_period_s": HEALTH_PERIOD_S, "health_check_timeout_s": 10, "graceful_shutdown_timeout_s": limits.graceful_shutdown_timeout_s}


def surge_options(percent: int) -> dict[str, int]:
    """Extra replicas during an update, in percent. Ray before 2.60 does not know it: there the old replica goes first and requests wait."""
    from ray import serve

    return {"max_surge_percent": percent} if "max_surge_percent" in inspect.signature(serve.deployment).parameters else {}
