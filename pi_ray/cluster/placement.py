"""Where each step's workers run: Ray's options of its tasks and actors, the gang of training workers, and both in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pi_ray.errors import ConfigError

if TYPE_CHECKING:
    from pi_ray.config import RunConfig

OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}  # Ray's names for a task or actor; other resources are named as they are
PACK = "PACK"  # Ray's strategy for a gang: on as few nodes as hold it, since gradients travel faster inside a node


def nodes() -> list[dict[str, float]]:
    """What each living node has, as Ray counts it: CPU, GPU, and names of your own."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def options(config: RunConfig, step: str) -> dict[str, Any]:
    """Ray's options of one task or actor of a step ("prepare", "evaluate", "serve"): what run.yaml asks for. Empty where it asks for nothing.

    Work that asks for no GPU goes to nodes without one as long as there are any: Ray's default.
    """
    asked, labels = getattr(config.cluster, f"{step}_resources"), config.cluster.labels.get(step)
    own = {name: amount for name, amount in asked.items() if name not in OPTIONS}
    known = {OPTIONS[name]: amount for name, amount in asked.items() if name in OPTIONS}
    return {**known, **({"resources": own} if own else {}), **({"label_selector": labels} if labels else {})}


def gang(config: RunConfig, has: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Ray Train's ScalingConfig of the training workers, on nodes that have `has`: all of them or none (a placement group), one worker a GPU.

    `train.gpu: auto` takes GPUs where there are enough, or where cluster.train_resources asks for them, as it must on a cluster that is still to grow.
    CPUs that run.yaml does not ask for are shared among the workers. Raises ConfigError where a worker is to have another share of GPUs than one.
    """
    asked, workers, gpu = dict(config.cluster.train_resources), config.train.workers, config.train.gpu
    if gpu == "auto":
        gpu = asked.get("GPU", 0) > 0 or sum(node.get("GPU", 0) for node in has) >= workers
    if asked.setdefault("GPU", 1 if gpu else 0) != (1 if gpu else 0):
        raise ConfigError(f"cluster.train_resources: a training worker has one GPU, or with train.gpu: false none; {asked['GPU']:g} was asked for")
    asked = {name: amount for name, amount in asked.items() if amount}
    asked.setdefault("CPU", _share([(node.get("CPU", 0), _most(node, asked, workers)) for node in has], workers))
    labels = config.cluster.labels.get("train")
    return {"num_workers": workers, "use_gpu": bool(gpu), "resources_per_worker": asked, "placement_strategy": PACK, **({"label_selector": labels} if labels else {})}


def _most(node: Mapping[str, float], asked: Mapping[str, float], workers: int) -> int:
    """How many workers a node holds by what is asked for."""
    return min([workers, *(int(node.get(name, 0) / amount) for name, amount in asked.items())])


def _share(hosts: Sequence[tuple[float, int]], workers: int) -> float:
    """Most CPUs that each worker can have on hosts of (CPUs, workers at most); 1 where they do not hold the workers yet. Whole from 1 on."""
    for share in sorted({cpus / k for cpus, most in hosts for k in range(1, most + 1)}, reverse=True):
        share = int(share) if share >= 1 else share
        if share and sum(min(most, int(cpus / share + 1e-9)) for cpus, most in hosts) >= workers:
            return share
    return 1


def placement(config: RunConfig) -> str:
    """Where each step runs, in one sentence, for `pi-ray plan`."""
    gpus = "GPU nodes, one worker a GPU" if config.train.gpu is True or config.cluster.train_resources.get("GPU") else "GPUs if there are enough, one worker each, else CPUs"
    train = _wish(config, "train", gpus if config.train.gpu is not False else "CPU nodes")
    others = "; ".join(f"{step} on {_wish(config, step, usual)}" for step, usual in (("prepare", "CPU nodes"), ("evaluate", "a GPU each, or a node's CPUs"), ("serve", "its replicas' nodes")))
    return f"{config.train.workers} training worker(s) start as one gang, all or none (a placement group, {PACK}: on as few nodes as hold it), on {train}; {others}."


def _wish(config: RunConfig, step: str, usual: str) -> str:
    """What run.yaml asks for a worker of a step, in words; `usual` where it asks for nothing."""
    asked = ", ".join(f"{amount:g} {name}" for name, amount in getattr(config.cluster, f"{step}_resources").items())
    labels = ", ".join(f"{name}={value}" for name, value in config.cluster.labels.get(step, {}).items())
    return " ".join(filter(None, (f"{usual} ({asked} each)" if asked and step == "train" else f"nodes with {asked} for each worker" if asked else usual, f"labelled {labels}" if labels else "")))
