"""Where it runs: the cluster that a job is sent to, what each step asks of it, and what `pi-ray render` fills its files with."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pi_ray.config.block import PLAIN_URL, Block, Count, Positive

Resources = dict[str, Annotated[float, Field(ge=0)]]  # as Ray counts them: CPU, GPU, or any name of your own
Step = Literal["prepare", "train", "evaluate", "serve"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]  # what Kubernetes takes as a name (RFC 1123)
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._/:@-]*$")]  # what needs no quotes in a shell or in YAML
Line = Annotated[str, Field(pattern=r"^[^\n\r]*$")]


class KubernetesConfig(Block):
    """What the KubeRay files need besides the nodes. Names of secrets stand here, secrets never."""

    namespace: Name = "pi-ray"
    secret: Name = Field("pi-ray", description="Kubernetes Secret with the keys auth_token (Ray), api_key (serving), redis_password, and hf_token if the hub asks for one")
    service_account: Literal[""] | Name = Field("", description="for pods that read s3:// or gs:// through the cloud's workload identity")
    storage_claim: Name = Field("pi-ray", description="ReadWriteMany PersistentVolumeClaim, mounted at cluster.storage_path")
    storage_class: Literal[""] | Name = Field("", description="of a claim that is made for you; empty: the cluster's default")
    storage_gib: Positive = 1000
    redis: Word = Field("", description="host:port of your own Redis for the GCS's fault tolerance; empty: a small one is among the files")
    refresh: Annotated[str, Field(pattern=r"^[0-9A-Za-z*/, -]+$")] = Field("0 3 * * 0", description="when the adapter is trained again on the rows as they are then, from where it stands (cron)")


class LauncherConfig(Block):
    """Machines of a cloud, for `ray up`."""

    provider: Literal["aws", "gcp"] = "aws"
    region: Word = Field("", description="empty: us-west-2, us-central1")
    zone: Word = Field("", description="empty: us-west-2a, us-central1-a")
    project: Word = Field("", description="GCP's project id; empty: that of your credentials")
    image_id: Word = Field("", description="AMI or GCP source image with Docker and a recent NVIDIA driver; empty: Ray's own choice, whose driver may be too old")
    gpu_machine: Word = Field("", description="empty: 8 A100s of gpu_memory_gib: p4d.24xlarge, p4de.24xlarge; a2-highgpu-8g, a2-ultragpu-8g")
    cpu_machine: Word = Field("", description="empty: m6i.8xlarge, n2-standard-32")
    nfs: Word = Field("", description="server:/path that each node mounts at cluster.storage_path")
    ssh_from: Annotated[str, Field(pattern=r"^[0-9./]*$")] = Field("", description="addresses that may reach the nodes by SSH, such as 203.0.113.0/24 (AWS); empty: any")


class SlurmConfig(Block):
    """The batch job."""

    partition: Word = ""
    account: Word = ""
    time: Annotated[str, Field(pattern=r"^[0-9:-]+$")] = "2-00:00:00"
    setup: tuple[Line, ...] = Field((), description="lines run before Ray starts, such as 'source /shared/venv/bin/activate'")


class ClusterConfig(Block):
    """The cluster. No part of it changes what a run learns, so none of it is in a fingerprint. Secrets are named here, never written."""

    address: str = Field("", description="of the cluster's Jobs API, such as http://127.0.0.1:8265; empty: --address, or RAY_API_SERVER_ADDRESS")
    prepare_resources: Resources = Field({}, description="Ray resources of one preparing worker, such as {CPU: 2, highmem: 1}; fractions are fine; memory, in bytes: no more workers on a node than it holds, where each has a large example bank")
    train_resources: Resources = Field({}, description="of one training worker, such as {GPU: 1, CPU: 8}")
    evaluate_resources: Resources = Field({}, description="of one evaluating worker")
    serve_resources: Resources = Field({}, description="of one serving replica")
    labels: dict[Step, dict[Word, Word]] = Field({}, description="Ray node labels that a step's workers are bound to, such as {evaluate: {ray.io/accelerator-type: A100}}")
    storage_path: Word = Field("", description="storage that every node sees, for run directories and the adapter store: a folder such as an NFS mount, s3://bucket/folder or gs://bucket/folder")
    image: Word = Field("pi-ray:cuda", description="container image, made from cluster/Dockerfile")
    gpus_per_node: Positive = 8
    gpu_memory_gib: Positive = Field(80, description="of one GPU: 80, or 40 for the smaller A100")
    gpu_node_cpus: Positive = Field(88, description="of a GPU node that Ray may use")
    gpu_node_memory_gib: Count = Field(0, description="host memory of a GPU node that Ray may use; 0: what the model needs")
    gpu_node_labels: dict[Word, Word] = Field({}, description="Kubernetes labels of GPU nodes, such as {cloud.google.com/gke-accelerator: nvidia-a100-80gb}")
    cpu_nodes: Count = Field(4, description="CPU nodes that are added while rows are prepared, at most")
    cpu_node_cpus: Positive = 30
    cpu_node_memory_gib: Positive = 110
    kubernetes: KubernetesConfig = KubernetesConfig()
    launcher: LauncherConfig = LauncherConfig()
    slurm: SlurmConfig = SlurmConfig()

    def __hash__(self) -> int:  # a run's config can be a key, and dicts have no hash of their own
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _no_secret(self) -> ClusterConfig:
        if self.address and not re.fullmatch(PLAIN_URL, self.address):
            raise ValueError("cluster.address must be an http or https URL without user, password or query; the token belongs in RAY_AUTH_TOKEN or a file that RAY_AUTH_TOKEN_PATH names")
        for place, value in (("storage_path", self.storage_path), ("kubernetes.redis", self.kubernetes.redis), ("image", self.image)):
            if "@" in value and not (place == "image" and "@sha256:" in value):
                raise ValueError(f"cluster.{place} may not hold a user or a password; credentials belong in the environment or in a Kubernetes Secret")
        return self
