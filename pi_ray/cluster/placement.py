"""Where each step's workers run: Ray's options of its tasks and actors, the scaling of training, and both in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.config.cluster import Step
from pi_ray.errors import ConfigError

RAY_NAMES = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}  # other resources keep their names
PACK = "PACK"  # Ray's placement strategy: on as few nodes as possible, since gradients travel faster inside a node


def cluster_nodes() -> list[dict[str, float]]:
    """The resources of each living node as Ray counts them: CPU, GPU, and names of your own."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def worker_options(config: RunConfig, step: Step) -> dict[str, Any]:
    """Ray's options of a task or actor of a step. Without GPUs among them Ray itself prefers nodes without one."""
    asked, labels = getattr(config.cluster, f"{step}_resources"), config.cluster.labels.get(step)
    own = {name: amount for name, amount in asked.items() if name not in RAY_NAMES}
    known = {RAY_NAMES[name]: amount for name, amount in asked.items() if name in RAY_NAMES}
    return {**known, **({"resources": own} if own else {}), **({"label_selector": labels} if labels else {})}


def expects_gpus(config: RunConfig, step: Step) -> bool:
    """Whether run.yaml says that a worker of a step has a GPU, whose node may be still to come."""
    return bool(getattr(config.cluster, f"{step}_resources").get("GPU", config.train.gpu is True))


def training_scaling(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Arguments of Ray Train's ScalingConfig on `nodes` with these resources: all workers start or none, one a GPU.

    `train.gpu: auto` takes GPUs where there are enough, or where cluster.train_resources asks for them, as it must on a
    cluster that is still to grow. Workers share the CPUs that run.yaml does not ask for. Raises ConfigError where a
    worker would have another share of GPUs than one.
    """
    asked, workers, gpu = dict(config.cluster.train_resources), config.train.workers, config.train.gpu
    if gpu == "auto":
        gpu = asked.get("GPU", 0) > 0 or sum(n.get("GPU", 0) for n in nodes) >= (config.train.min_workers or workers)
    if asked.setdefault("GPU", 1 if gpu else 0) != (1 if gpu else 0):
        allowed = "a training worker has one GPU, or with train.gpu: false none"
        raise ConfigError(f"cluster.train_resources: {allowed}; {asked['GPU']:g} was asked for")
    asked = {name: amount for name, amount in asked.items() if amount}
    asked.setdefault("CPU", _cpus_per_worker([(n.get("CPU", 0), _capacity(n, asked, workers)) for n in nodes], workers))
    labels = config.cluster.labels.get("train")
    count: dict[str, Any] = {"num_workers": workers}
    if least := config.train.min_workers:
        every = config.train.resize_every_s
        count = {"num_workers": (least, workers), "elastic_resize_monitor_interval_s": every}
    return {
        **count, "use_gpu": bool(gpu), "resources_per_worker": asked, "placement_strategy": PACK,
        **({"label_selector": labels} if labels else {}),
    }


def _capacity(node: Mapping[str, float], asked: Mapping[str, float], workers: int) -> int:
    """How many workers a node holds when each takes what is asked for."""
    return min([workers, *(int(node.get(name, 0) / amount) for name, amount in asked.items())])


def _cpus_per_worker(nodes: Sequence[tuple[float, int]], workers: int) -> float:
    """Most CPUs for each worker on nodes of (CPUs, capacity): whole from 1 on, and 1 where nodes are too few."""
    for candidate in sorted({cpus / k for cpus, capacity in nodes for k in range(1, capacity + 1)}, reverse=True):
        share = int(candidate) if candidate >= 1 else candidate
        if share and sum(min(capacity, int(cpus / share + 1e-9)) for cpus, capacity in nodes) >= workers:
            return share
    return 1


def describe_placement(config: RunConfig) -> str:
    """Where each step runs, in one sentence, for `pi-ray plan`."""
    certain = config.train.gpu is True or config.cluster.train_resources.get("GPU")
    gpus = "GPU nodes, one worker a GPU" if certain else "GPUs if there are enough, one worker each, else CPUs"
    train = _nodes_of(config, "train", gpus if config.train.gpu is not False else "CPU nodes")
    usual: dict[Step, str] = {
        "prepare": "CPU nodes", "evaluate": "as many GPUs as a copy of the base takes, or a node's CPUs",
        "serve": "its replicas' nodes",
    }
    others = "; ".join(f"{step} on {_nodes_of(config, step, where)}" for step, where in usual.items())
    gang = f"all or none (a placement group, {PACK}: on as few nodes as possible)"
    least, most = config.train.min_workers, config.train.workers
    return f"{f'{least} to {most}' if least else most} training worker(s) start together, {gang}, on {train}; {others}."


def _nodes_of(config: RunConfig, step: Step, usual: str) -> str:
    """The nodes that run.yaml asks for a worker of a step, in words; `usual` where it asks for nothing."""
    asked = ", ".join(f"{amount:g} {name}" for name, amount in getattr(config.cluster, f"{step}_resources").items())
    labels = ", ".join(f"{name}={value}" for name, value in config.cluster.labels.get(step, {}).items())
    if asked:
        usual = f"{usual} ({asked} each)" if step == "train" else f"nodes with {asked} for each worker"
    return f"{usual} labelled {labels}" if labels else usual
