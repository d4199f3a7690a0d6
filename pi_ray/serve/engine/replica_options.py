"""Options of Ray Serve for the replicas that hold a base model: queues, autoscaling, resources, health checks, router.
"""

from typing import Any

from pi_ray.config import ServeConfig
from pi_ray.errors import ConfigError

HEALTH_PERIOD_S = 2  # Serve replaces a replica after three failures in a row
DEFAULT_MAX_LORAS = 16  # when serve.max_loras is not set


def replica_options(limits: ServeConfig, cluster: dict[str, float], actor_options: dict[str, Any]) -> dict[str, Any]:
    """Options for replicas that hold the base model, each with a GPU where the resources in `cluster` have any."""
    scarce = cluster.get("GPU") or cluster.get("CPU", 0)
    return {
        "max_ongoing_requests": limits.max_ongoing_requests, "max_queued_requests": limits.max_queued_requests,
        "autoscaling_config": {
            "min_replicas": limits.min_replicas, "max_replicas": limits.max_replicas,
            # One starts even where none may be left: a model that cannot load then fails the deployment.
            "initial_replicas": max(1, limits.min_replicas), "look_back_period_s": 15,
            "target_ongoing_requests": limits.max_ongoing_requests * 0.75,
            "upscale_delay_s": limits.upscale_delay_s, "downscale_delay_s": limits.downscale_delay_s,
            "downscale_to_zero_delay_s": limits.downscale_to_zero_delay_s,
        },
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(cluster.get("GPU", 0) > 0), **actor_options},
        # A new version comes up beside the old one, which serves until then; without room for both the old goes first.
        "max_surge_percent": 100 if scarce > limits.max_replicas else 0,
        "health_check_period_s": HEALTH_PERIOD_S, "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": limits.graceful_shutdown_timeout_s,
    }


def router_options(limits: ServeConfig) -> dict[str, Any]:
    """Options of a deployment for `serve.router`. A replica that is much busier than others gets no more for what it
    has read. Raises ConfigError where this version of Ray has its prefix-aware router elsewhere.
    """
    if limits.router == "power_of_two":
        return {}
    try:
        from pi_ray.serve.engine.prefix_router import PrefixRouter
    except ImportError as error:
        raise ConfigError(f"serve.router prefix: not with this version of Ray ({error}); take power_of_two") from error
    arguments = {"imbalanced_threshold": max(1, limits.max_ongoing_requests // 2), "do_eviction": True}
    return {"request_router_config": {"request_router_class": PrefixRouter, "request_router_kwargs": arguments}}
