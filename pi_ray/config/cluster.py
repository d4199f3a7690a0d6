"""Block `cluster`: where jobs are sent, the resources of each step, and the values of `pi-ray render`'s files."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pi_ray.config.block import Amount, Block, Count, Positive, check_plain_url, check_storage_url, doc, refuse

Resources = dict[str, Amount]  # as Ray counts them: CPU, GPU, or any custom name
Step = Literal["prepare", "train", "evaluate", "serve"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]  # a Kubernetes name (RFC 1123)
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._/:@-]*$")]  # needs no quotes in a shell or in YAML
Line = Annotated[str, Field(pattern=r"^[^\n\r]*$")]


class KubernetesConfig(Block):
    """Values of the KubeRay files besides the nodes. Names of secrets stand here, secrets never."""

    namespace: Name = doc("pi-ray", "namespace of all that is rendered")
    secret: Name = doc("pi-ray", "Secret with the keys auth_token (Ray), api_key (serving), redis_password, and "
        "hf_token if the hub asks for one")
    service_account: Literal[""] | Name = doc("", "account of pods that read s3:// or gs:// by workload identity")
    storage_claim: Name = doc("pi-ray", "ReadWriteMany PersistentVolumeClaim, mounted at cluster.storage_path")
    storage_class: Literal[""] | Name = doc("", "class of a claim that is made for you; empty: the cluster's default")
    storage_gib: Positive = doc(1000, "GiB of storage_claim, for runs, store and the hub's cache; unused where "
        "cluster.storage_path is a bucket")
    redis: Word = doc("", "host:port of your Redis for the GCS's fault tolerance; empty: a small one is rendered too")
    refresh: Annotated[str, Field(pattern=r"^[0-9A-Za-z*/, -]+$")] = doc("0 3 * * 0", "when the adapter is trained "
        "again on the rows as they are then, from where it stands (cron)")


class LauncherConfig(Block):
    """Machines of a cloud, for `ray up`."""

    provider: Literal["aws", "gcp"] = doc("aws", "whose machines `ray up` starts")
    region: Word = doc("", "empty: us-west-2, us-central1")
    zone: Word = doc("", "empty: us-west-2a, us-central1-a")
    project: Word = doc("", "GCP's project id, without which 'pi-ray render' makes no file for GCP")
    image_id: Word = doc("", "AMI or GCP image with Docker and recent NVIDIA driver; empty: Ray's (driver may be old)")
    gpu_machine: Word = doc("", "empty: 8 A100s of gpu_memory_gib, such as p4d.24xlarge or a2-ultragpu-8g")
    cpu_machine: Word = doc("", "empty: m6i.8xlarge, n2-standard-32")
    nfs: Word = doc("", "server:/path that each node mounts at cluster.storage_path")
    ssh_from: Annotated[str, Field(pattern=r"^[0-9./]*$")] = doc("", "addresses that may reach the nodes by SSH (AWS), "
        "such as 203.0.113.0/24, once the rule for any address that Ray makes as well is revoked: 'pi-ray render' "
        "prints the command; empty: any")


class SlurmConfig(Block):
    """The batch job."""

    partition: Word = doc("", "empty: the cluster's default")
    account: Word = doc("", "account that the hours are charged to; empty: your default")
    time: Annotated[str, Field(pattern=r"^[0-9:-]+$")] = doc("2-00:00:00", "longest a job may take, as Slurm writes it")
    setup: tuple[Line, ...] = doc((), "lines run before Ray starts, such as 'source /shared/venv/bin/activate'")


class ClusterConfig(Block):
    """The cluster. No key changes what a run learns, so none is in a fingerprint. Secrets never stand here."""

    address: str = doc("", "URL of the Jobs API, as http://127.0.0.1:8265; empty: --address, RAY_API_SERVER_ADDRESS")
    prepare_resources: Resources = doc({}, "Ray resources of one preparing worker, such as {CPU: 2, highmem: 0.5}; "
        "memory, in bytes, keeps a node from holding too many workers with a large example bank each")
    train_resources: Resources = doc({}, "Ray resources of one training worker, such as {GPU: 1, CPU: 8}")
    evaluate_resources: Resources = doc({}, "Ray resources of one evaluating worker")
    serve_resources: Resources = doc({}, "Ray resources of one serving replica")
    labels: dict[Step, dict[Word, Word]] = doc({}, "Ray node labels that a step's workers are bound to, such as "
        "{evaluate: {ray.io/accelerator-type: A100}}")
    storage_path: Word = doc("", "storage that every node sees, for run directories and the adapter store: a folder "
        "such as an NFS mount, s3://bucket/folder or gs://bucket/folder")
    image: Word = doc("pi-ray:cuda", "container image, made from cluster/Dockerfile")
    gpus_per_node: Positive = doc(8, "GPUs of a GPU node")
    gpu_memory_gib: Positive = doc(80, "memory of one GPU: 80, or 40 for the smaller A100")
    gpus_per_replica: Literal["auto"] | Positive = doc("auto", "GPUs of a node over which one copy of the base model "
        "is spread in evaluation, as a teacher and in serving; auto: as few as hold it")
    gpu_node_cpus: Positive = doc(88, "CPUs of a GPU node that Ray may use")
    gpu_node_memory_gib: Count = doc(0, "host memory of a GPU node that Ray may use; 0: what the model needs")
    gpu_node_labels: dict[Word, Word] = doc({}, "Kubernetes labels of GPU nodes, such as "
        "{cloud.google.com/gke-accelerator: nvidia-a100-80gb}")
    cpu_nodes: Count = doc(4, "CPU nodes that are added while rows are prepared, at most")
    cpu_node_cpus: Positive = doc(30, "CPUs that a CPU node gives to Ray")
    cpu_node_memory_gib: Positive = doc(110, "memory that a CPU node gives to Ray")
    kubernetes: KubernetesConfig = KubernetesConfig()
    launcher: LauncherConfig = LauncherConfig()
    slurm: SlurmConfig = SlurmConfig()

    def __hash__(self) -> int:  # a run's config can be a key, and dicts have no hash of their own
        return hash(self.model_dump_json())

    def model_post_init(self, context: Any) -> None:
        token_goes = "the token belongs in RAY_AUTH_TOKEN or a file that RAY_AUTH_TOKEN_PATH names"
        check_plain_url(self.address, "cluster.address", token_goes)
        image = self.image.replace("@sha256:", "")
        check_storage_url(self.storage_path, "cluster.storage_path")
        values = {"kubernetes.redis": self.kubernetes.redis, "image": image}
        for key, value in values.items():
            refuse("@" in value, f"cluster.{key} may not hold a user or a password; "
                "credentials belong in the environment or in a Kubernetes Secret")
