"""Options of Ray Serve for the replicas that hold or front an engine: queues, autoscaling, resources, health checks."""

from __future__ import annotations

from typing import Any

from pi_ray.config import ServeConfig

HEALTH_PERIOD_S = 2  # Serve replaces a replica after three failures in a row


def replica_options(limits: ServeConfig, cluster: dict[str, float], actor_options: dict[str, Any]) -> dict[str, Any]:
    """Options for replicas that hold the base model.

    `cluster`: its resources; each replica gets a GPU where there are any. `actor_options`: Ray's, from the run file.
    """
    scarce = cluster.get("GPU") or cluster.get("CPU", 0)
    return {
        "max_ongoing_requests": limits.max_ongoing_requests,
        "max_queued_requests": limits.max_queued_requests,
        "autoscaling_config": {
            "min_replicas": limits.min_replicas,
            # One starts even where none may be left: a model that cannot load then fails the deployment.
            "initial_replicas": max(1, limits.min_replicas),
            "max_replicas": limits.max_replicas,
            "target_ongoing_requests": limits.max_ongoing_requests * 0.75,
            "upscale_delay_s": limits.upscale_delay_s,
            "downscale_delay_s": limits.downscale_delay_s,
            "downscale_to_zero_delay_s": limits.downscale_to_zero_delay_s,
            "look_back_period_s": 15,
        },
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(cluster.get("GPU", 0) > 0), **actor_options},
        # A new version comes up beside the old one, which serves until then. Without room for both the old one goes
        # first.
        "max_surge_percent": 100 if scarce > limits.max_replicas else 0,
        **lifecycle_options(limits),
    }


def front_replica_options(limits: ServeConfig) -> dict[str, Any]:
    """Options for Model in front of an engine with its own deployment: one light replica checks and tokenises."""
    return {
        "num_replicas": 1,
        "max_ongoing_requests": limits.max_ongoing_requests * limits.max_replicas,
        "max_queued_requests": limits.max_queued_requests,
        "ray_actor_options": {"num_cpus": 1},
        "max_surge_percent": 100,
        **lifecycle_options(limits),
    }


def lifecycle_options(limits: ServeConfig) -> dict[str, Any]:
    """Serve replaces a replica that fails its health check, and lets one that has to go finish what it has begun."""
    return {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": limits.graceful_shutdown_timeout_s,
    }
