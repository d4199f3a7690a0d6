"""`pi-ray render`: the files that make a cluster (k8s: KubeRay, launcher: `ray up`, slurm), filled from a run file."""

import json
import math
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pi_ray.config import RunConfig, dump_config
from pi_ray.config.cluster import Step
from pi_ray.errors import ConfigError
from pi_ray.plan import estimate
from pi_ray.run.artifact import digest, write_atomic
from pi_ray.run.object_storage import is_url
from pi_ray.train.replicas import replica_gpus

KINDS = {
    "k8s": ("base.yaml", "raycluster.yaml", "rayjob.yaml", "raycronjob.yaml", "rayservice.yaml"),
    "launcher": ("aws.yaml", "gcp.yaml"),
    "slurm": ("run.sh", "run.yaml"),
}
GIB = 2**30
OBJECT_STORE = 10  # GiB of Ray's object store on a GPU node: training reads memory-mapped files
MARGIN = 8  # GiB for Ray itself and the page cache
LONGEST = 24  # characters of a run's name in KubeRay's, which add words and hashes of their own up to 47
PLENTY = 1000  # of each custom resource: it says where work may go and not how much
SERVE_PATHS = ("keys_file", "usage_dir")  # keys of `serve` that are paths
BUILT_IN = {"CPU", "GPU", "memory", "object_store_memory"}  # resources that Ray counts by itself
MACHINES = {  # provider -> GPU memory in GiB -> machine with 8 A100s; and the CPU machine
    "aws": ({40: "p4d.24xlarge", 80: "p4de.24xlarge"}, "m6i.8xlarge", "us-west-2", "us-west-2a"),
    "gcp": ({40: "a2-highgpu-8g", 80: "a2-ultragpu-8g"}, "n2-standard-32", "us-central1", "us-central1-a"),
}


@dataclass(frozen=True)
class Nodes:
    """GPU nodes for training and a serving replica's share of one. Memory in GiB."""

    gpu: int
    gpus: int
    gpu_memory: int
    serve_cpus: int
    serve_memory: int
    fixed: float  # GPU memory that weights and optimiser take on each GPU, before activations
    copy: int  # GPUs over which one copy of the base is spread


def render_cluster_files(kind: str, config: RunConfig, folder: Path) -> tuple[dict[str, str], list[str]]:
    """(file name -> text, notes for the person); of the launcher's files only its provider's. `folder` has the run.

    Raises ModelError (no shape of the model) and ConfigError (it cannot fit, or the files cannot use the run file).
    """
    import jinja2

    values, notes = _template_values(config, folder.resolve())
    storage, launcher = values["storage"], config.cluster.launcher
    if kind == "slurm" and not values["mounted"]:
        needed = "a Slurm job keeps its run in a folder that every node sees, such as /shared; name that one"
        raise ConfigError(f"cluster.storage_path is {storage}: {needed}")
    if kind == "slurm":
        notes.append(f"copy run.yaml to {storage}/inputs/{config.name}.yaml, where run.sh reads it")
    if kind == "launcher":
        values["launcher"] = _launcher(config)
        if launcher.provider == "aws" and launcher.ssh_from:
            notes.append(_revoke_ssh(values["name_k8s"], values["launcher"]["region"]))
        if not values["mounted"]:
            right = f"the workers need the right to read and write {storage}: Ray gives a role to the head alone"
            notes.append(f"{right}, so name theirs in node_config (AWS: IamInstanceProfile, GCP: serviceAccounts)")
        elif not launcher.nfs:
            cure = "name an NFS server in cluster.launcher.nfs, or a bucket in cluster.storage_path"
            notes.append(f"nothing mounts {storage} on the machines: {cure}")
    # No HTML: the filters below quote values for YAML and for the shell; other values are limited to plain characters.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pi_ray.cluster.render", kind), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )
    environment.filters["q"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    wanted = [name for name in KINDS[kind] if kind != "launcher" or name.startswith(launcher.provider)]
    return {name: environment.get_template(f"{name}.j2").render(values) for name in wanted}, notes


def write_cluster_files(found: dict[str, str], folder: Path) -> list[Path]:
    paths = [write_atomic(folder / name, text) for name, text in found.items()]
    for script in (path for path in paths if path.suffix == ".sh"):
        script.chmod(0o755)
    return paths


def _template_values(config: RunConfig, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(values of the templates, notes). What lies in `folder` is expected in the storage's inputs/NAME."""
    root = (config.cluster.storage_path or "/shared").rstrip("/")
    seen = _as_the_cluster_sees_it(config, folder, root)
    nodes = _nodes(seen, estimate.model_size(config.model, config.train.lora))
    # Without defaults; with them where the shorter text would not read back to the same run.
    run_yaml = yaml.safe_dump(
        seen.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=160,
    )
    if RunConfig.model_validate(yaml.safe_load(run_yaml)) != seen:
        run_yaml = dump_config(seen)
    on_cpus: tuple[Step, ...] = () if seen.train.gpu else ("train", "evaluate")
    return {
        "name": config.name, "name_k8s": _kubernetes_name(seen.name), "run": seen,
        "run_file": "/etc/pi-ray/run.yaml", "run_yaml": run_yaml, "run_digest": digest(run_yaml)[:12],
        "cluster": seen.cluster, "kubernetes": seen.cluster.kubernetes, "slurm": seen.cluster.slurm,
        "storage": root, "mounted": not is_url(root), "ray": version("ray"),
        "nodes": nodes, "gpu": nodes.gpu > 0, "resource_name": "nvidia.com/gpu", "object_store": OBJECT_STORE * GIB,
        "cpu_offer": _offer(seen, "prepare", *on_cpus), "gpu_offer": _offer(seen, "train", "evaluate"),
        "serve_offer": _offer(seen, "serve"), "any_offer": _offer(seen, "prepare", "train", "evaluate"),
    }, _notes(seen, nodes, folder)


def _kubernetes_name(name: str) -> str:
    """The run's name as Kubernetes takes it (DNS-1035), with a hash where it is changed, so that no two are the same.
    """
    plain = re.sub(r"[._]+", "-", name).strip("-")
    if plain == name and len(name) <= LONGEST and name[0].isalpha():
        return name
    return f"{f'r-{plain}'[: LONGEST - 7].strip('-')}-{digest(name)[:6]}"


def _as_the_cluster_sees_it(config: RunConfig, folder: Path, root: str) -> RunConfig:
    """The run with paths on the storage `root`, and with GPUs, as nodes that come on demand cannot be seen yet."""
    here = str(folder)
    task = {
        f"task.{key}": f"{root}/inputs/{config.name}{value[len(here):]}"
        for key, value in _task_texts(config).items()
        if value == here or value.startswith(f"{here}/")
    }
    # Beside a bucket each node has a run directory of its own.
    run_dir = f"runs/{config.name}" if is_url(root) else f"{root}/runs/{config.name}"
    work = str(Path.cwd())  # where relative paths of the serve block start
    serve = {} if is_url(root) else {
        f"serve.{key}": f"{root}{value[len(work):]}"
        for key in SERVE_PATHS
        if (value := getattr(config.serve, key)).startswith(f"{work}/")
    }
    own = {"run_dir": run_dir, "store": f"{root}/store", "train.gpu": config.train.gpu is not False}
    return config.replace(**own, **task, **serve, **{"cluster.storage_path": root})


def _task_texts(config: RunConfig) -> dict[str, str]:
    """Key below `task` -> text, of those that may be paths."""
    return {**{k: v for k, v in config.task.model_dump().items() if isinstance(v, str)}, **config.task.inputs}


def _nodes(config: RunConfig, size: estimate.ModelSize) -> Nodes:
    """Size the nodes after the model. Raises ConfigError where a worker does not fit."""
    cluster, train = config.cluster, config.train
    base = size.weights * estimate.BYTES[estimate.dtype_name(config)]
    fixed = sum(estimate.device_memory(size, estimate.Shape(0, 0, 1), config).values())
    if not train.gpu:
        if fixed > cluster.cpu_node_memory_gib * GIB:
            offered = f"cluster.cpu_node_memory_gib is {cluster.cpu_node_memory_gib}"
            raise ConfigError(f"one training worker holds {fixed / GIB:.0f} GiB and {offered}; name larger nodes")
        return Nodes(0, 0, 0, cluster.cpu_node_cpus, cluster.cpu_node_memory_gib, fixed, 0)
    gpus = min(cluster.gpus_per_node, train.workers)
    if fixed > cluster.gpu_memory_gib * GIB:
        taken = f"{fixed / GIB:.0f} GiB of each GPU's {cluster.gpu_memory_gib} (cluster.gpu_memory_gib)"
        cure = "take train.backend.zero_stage 3, more train.workers, or offload_params and offload_optimizer"
        raise ConfigError(f"weights and optimiser alone take {taken}; {cure}")
    needed = _round(estimate.node_memory(size, config, gpus) / GIB + OBJECT_STORE + MARGIN)
    given = cluster.gpu_node_memory_gib
    if given and given < needed:
        taken = f"{gpus} workers of this model take about {needed} GiB of a node's memory"
        raise ConfigError(f"cluster.gpu_node_memory_gib is {given}, and {taken}; raise it, or leave it out")
    copy, serving = replica_gpus(config), _round(base / GIB + OBJECT_STORE + MARGIN)
    share = copy if config.serve.engine == "vllm" else 1  # of a node's GPUs, for one serving replica
    cpus = max(1, cluster.gpu_node_cpus * share // cluster.gpus_per_node)
    return Nodes(math.ceil(train.workers / gpus), gpus, given or needed, cpus, serving, fixed, copy)


def _round(gib: float) -> int:
    return 8 * math.ceil(gib / 8)


def _offer(config: RunConfig, *steps: Step) -> dict[str, dict[str, Any]]:
    """Custom resources (amounts, and KubeRay's words for them) and labels of some steps' nodes; ray.io/... Ray sets."""
    cluster = config.cluster
    names = sorted({name for step in steps for name in getattr(cluster, f"{step}_resources")} - BUILT_IN)
    labels = {key: value for step in steps for key, value in cluster.labels.get(step, {}).items()}
    return {
        "names": dict.fromkeys(names, PLENTY), "words": dict.fromkeys(names, str(PLENTY)),
        "labels": {key: value for key, value in labels.items() if not key.startswith("ray.io/")},
    }


def _launcher(config: RunConfig) -> dict[str, Any]:
    """The launcher block with the provider's usual machines where it names none."""
    given = config.cluster.launcher
    if given.provider == "gcp" and not given.project:
        raise ConfigError("cluster.launcher.project is empty, and `ray up` on GCP needs your project's id; name it")
    gpu, cpu, region, zone = MACHINES[given.provider]
    machine = given.gpu_machine or gpu.get(config.cluster.gpu_memory_gib, "")
    if not machine or (config.cluster.gpus_per_node != 8 and not given.gpu_machine):
        wanted = f"{config.cluster.gpus_per_node} A100s of {config.cluster.gpu_memory_gib} GiB"
        cure = "name one in cluster.launcher.gpu_machine, or take 8 GPUs of 40 or 80 GiB"
        raise ConfigError(f"{given.provider} has no usual machine with {wanted}; {cure}")
    machines = {"gpu_machine": machine, "cpu_machine": given.cpu_machine or cpu}
    return {**given.model_dump(), **machines, "region": given.region or region, "zone": given.zone or zone}


def _revoke_ssh(group: str, region: str) -> str:
    """The note that takes away the rule that Ray adds to a security group that has none yet."""
    found = f"aws ec2 describe-security-groups --region {region} --filters Name=group-name,Values={group}"
    revoke = f"aws ec2 revoke-security-group-ingress --region {region} --protocol tcp --port 22 --cidr 0.0.0.0/0"
    query = "--query 'SecurityGroups[].GroupId' --output text"
    why = f"Ray opens SSH to any address when it makes the security group {group}, besides cluster.launcher.ssh_from"
    return f'{why}; after the first `ray up` give: {revoke} --group-id "$({found} {query})"'


def _notes(config: RunConfig, nodes: Nodes, folder: Path) -> list[str]:
    """Notes on what a person must still do, and on what cannot work with these files."""
    root, notes = config.cluster.storage_path, []
    if config.serve.keys_file.startswith(f"{root}/"):
        notes.append(f"put the keys file at {config.serve.keys_file}, where serving reads it")
    texts = _task_texts(config)
    if config.task.name != "opsql" and any(v.startswith(f"{root}/inputs/") for v in texts.values()):
        notes.append(f"copy {folder} to {root}/inputs/{config.name}: the run reads its rows and template there")
    paths = {f"task.{k}": v for k, v in texts.items()}
    paths |= {f"serve.{key}": getattr(config.serve, key) for key in SERVE_PATHS}
    elsewhere = [k for k, v in paths.items() if v.startswith("/") and not v.startswith(f"{root}/")]
    if elsewhere:
        notes.append(f"{', '.join(elsewhere)} must be on every node under the same path")
    if nodes.copy > 1 and config.serve.engine != "vllm":
        sizes = f"a copy takes {nodes.copy} of {config.cluster.gpu_memory_gib} GiB"
        cure = "take serve.engine vllm, which splits it, or larger GPUs"
        notes.append(f"serve.engine {config.serve.engine} holds the whole base on one GPU, and {sizes}: {cure}")
    return notes
