"""Copies of the base model that generate, outside training: the GPUs of each, Ray's options of its actor, loading.

Evaluation, a base model as teacher and a writer of queries have one copy in each actor. A base that is larger than one
GPU is spread over several of a node by layers (transformers' balanced device map), one after another for each token;
`serve.engine: vllm` splits each layer instead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pi_ray.cluster import placement
from pi_ray.config import ModelConfig, RunConfig
from pi_ray.errors import ConfigError, ModelError
from pi_ray.models import load_model, model_dtype
from pi_ray.models.device import best_device
from pi_ray.train.base_size import base_size

log = logging.getLogger("pi_ray")
GIB = 2**30
USABLE = 0.9  # of a GPU's memory: the rest is its driver's and what fragments
BATCH_TOKENS = 16_384  # keys and values of a batch, such as 16 rows of 1,024 tokens
ADAPTER_SHARE = 0.02  # of the base weights, for the adapters beside them: LoRA of rank 32 has 1.2% in a 7B model
WORKSPACE = 2 * GIB  # of each GPU: activations, logits, libraries


def replica_bytes(config: RunConfig) -> dict[str, float]:
    """GPU memory of one copy that generates, by what holds it. Raises ModelError for an unknown base model."""
    size, width = base_size(config.model), model_dtype(config.model, "cuda").itemsize
    return {
        "base weights": size.weight_bytes(config.model, width),
        "keys and values": BATCH_TOKENS * size.cached * width, "adapters": ADAPTER_SHARE * size.weights * width,
    }


def replica_gpus(config: RunConfig) -> int:
    """GPUs over which one copy of the base model is spread: `cluster.gpus_per_replica`, or as few as hold it.

    A power of two, as tensor parallelism needs. Raises ConfigError where a node has too few, ModelError.
    """
    asked, cluster = config.cluster.gpus_per_replica, config.cluster
    gib = gpu_gib(config)
    each = max(GIB, USABLE * gib * GIB - WORKSPACE)
    needed = sum(replica_bytes(config).values())
    found = asked if asked != "auto" else 1 << max(0, math.ceil(math.log2(needed / each)))
    if found > cluster.gpus_per_node:
        copy = f"one copy of {config.model.base}, with a batch of {BATCH_TOKENS:,} tokens, takes {needed / GIB:.0f} GiB"
        raise ConfigError(
            f"{copy}, so {found} GPUs of {gib:.0f} GiB, and a node has {cluster.gpus_per_node} "
            f"(cluster.gpus_per_node): the smallest cluster that would do has a node of {found} such GPUs; or give "
            "cluster.gpu_memory_gib, or cluster.gpus_per_replica where rows are few and short, or take "
            "model.quantize: 4bit or a smaller model.base"
        )
    return found


def gpu_gib(config: RunConfig) -> float:
    """GiB of one GPU: `cluster.gpu_memory_gib`, or less where this machine has smaller ones."""
    import torch

    here = [torch.cuda.get_device_properties(i).total_memory / GIB for i in range(torch.cuda.device_count())]
    return min([config.cluster.gpu_memory_gib, *here])


def check_replica(config: RunConfig) -> None:
    """Refuse a run whose base model no node of its GPUs holds for evaluation, before anything is trained.

    Raises ConfigError. A base model that cannot be looked at from here passes.
    """
    import torch

    if config.train.gpu is True or (config.train.gpu == "auto" and torch.cuda.is_available()):
        with suppress(ModelError):
            replica_gpus(config)


def generation_workers(
    config: RunConfig, nodes: Sequence[Mapping[str, float]], actors: int = 0
) -> tuple[int, dict[str, Any]]:
    """(number of actors, Ray's options of each) for generation on `nodes` with these resources.

    One actor for each copy that the GPUs hold, unless `actors` says how many; without GPUs one with almost all CPUs of
    a node, or with `train.gpu: true` one on GPUs whose node is still to come. `cluster.evaluate_resources` comes first.
    Raises ConfigError where no node has the GPUs of one copy.
    """
    options = placement.worker_options(config, "evaluate")
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if asked := config.cluster.evaluate_resources:
        fitting = int(sum(count // asked["GPU"] for count in gpus)) if asked.get("GPU") else 1
        return actors or max(1, fitting), options
    if not (any(gpus) or placement.expects_gpus(config, "evaluate")):
        cpus = max(1, int(max(node.get("CPU", 0) for node in nodes)) - 1)
        return actors or 1, {"num_cpus": cpus, **options}
    each = replica_gpus(config)
    copies = sum(count // each for count in gpus) if any(gpus) else 1  # whose node comes when it asks for it
    if not copies:
        raise ConfigError(
            f"one copy of {config.model.base} is spread over {each} GPUs of a node (cluster.gpus_per_replica), and the "
            f"largest node has {max(gpus)}; take larger nodes, model.quantize: 4bit, or a smaller model.base"
        )
    return actors or copies, {"num_gpus": each, **options}


def load_for_generation(settings: ModelConfig) -> Any:
    """The base model in this actor, which has the machine's CPUs or the GPUs that Ray gave it: over all of them where
    they are several.
    """
    import joblib
    import torch

    if (device := best_device()) != "cuda":
        torch.set_num_threads(joblib.cpu_count())  # Ray leaves an actor one; nothing else runs in this step
        return load_model(settings, device)
    if (gpus := torch.cuda.device_count()) > 1:
        log.info("%s is spread by layers over %d GPUs (transformers, balanced)", settings.base, gpus)
        return load_model(settings, "cuda", spread=True)
    return load_model(settings, "cuda")
