"""`pi-ray render`: what is in the files follows the run file."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from pi_ray import cli
from pi_ray.cluster.render import render_cluster_files, write_cluster_files
from pi_ray.config import run_file
from pi_ray.errors import ConfigError
from pi_ray.plan import estimate
from tests.golden import cluster, kuberay

SMALL = estimate.ModelSize(
    weights=10**8, active=10**8, head=10**7, block=10**7, linear=9 * 10**7, lora=10**6, layers=8, hidden=512,
    inner=1024, key_value=256,
)
GCP = ("cluster.launcher.provider=gcp", "cluster.launcher.project=my-project")
TEXT = "name: my.task\ncluster: {storage_path: /data}\n"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(estimate, "model_size", lambda model, lora: SMALL)


def made(kind, tmp_path, *overrides, text=TEXT):
    return render_cluster_files(kind, run_file.parse_run_file(text, "run.yaml", overrides, folder=tmp_path), tmp_path)


def groups(files):
    return {g["groupName"]: g for g in yaml.safe_load(files["raycluster.yaml"])["spec"]["workerGroupSpecs"]}


def limits(group):
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_gpu_nodes_are_as_many_as_the_workers_need(small, tmp_path):
    files, _ = made("k8s", tmp_path, "train={workers: 12, batch_size: 24}", "cluster.gpus_per_node=8")
    gpu = groups(files)["gpu"]
    assert (gpu["minReplicas"], gpu["maxReplicas"]) == (0, 2), "12 workers, 8 on a node; none while nothing trains"
    assert limits(gpu)["nvidia.com/gpu"] == "8"
    files, _ = made("k8s", tmp_path, "train={workers: 2}")
    assert (groups(files)["gpu"]["maxReplicas"], limits(groups(files)["gpu"])["nvidia.com/gpu"]) == (1, "2")


def test_a_nodes_memory_is_what_the_model_takes_there(small, tmp_path):
    whole = 10**8 * 2 / 2**30
    assert (
        limits(groups(made("k8s", tmp_path, "train.workers=2")[0])["gpu"])["memory"]
        == f"{8 * -(-(2 * (6 + whole) + 18) // 8):.0f}Gi"
    )
    sharded = estimate.node_memory(
        SMALL, run_file.parse_run_file(TEXT, "t.yaml", ["train.gpu=true", "train.backend.zero_stage=3"]), 2
    )
    assert sharded == 2 * 6 * 2**30 + 2 * 10**8, "sharded: the checkpoint is mapped once"
    with pytest.raises(ConfigError, match=r"gpu_node_memory_gib is 16, and 2 workers of this model take about \d+ GiB"):
        made("k8s", tmp_path, "train.workers=2", "cluster.gpu_node_memory_gib=16")


def test_a_model_that_cannot_fit_is_refused_with_what_would_help(small, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "model_size", lambda model, lora: replace(SMALL, weights=10**11))
    with pytest.raises(
        ConfigError, match=r"take 186 GiB of each GPU's 80 .* take train\.backend\.zero_stage 3, more train\.workers"
    ):
        made("k8s", tmp_path)
    with pytest.raises(ConfigError, match="name larger nodes"):
        made("k8s", tmp_path, "train.gpu=false")


def test_without_gpus_there_are_cpu_nodes_alone(small, tmp_path):
    files, _ = made("k8s", tmp_path, "train.gpu=false", "cluster.cpu_nodes=3")
    assert list(groups(files)) == ["cpu"] and groups(files)["cpu"]["maxReplicas"] == 3
    assert "nvidia" not in "".join(files.values())
    assert "gpus-per-node" not in made("slurm", tmp_path, "train.gpu=false")[0]["run.sh"]


def test_the_run_file_in_the_cluster_has_the_clusters_paths(small, tmp_path):
    files, notes = made(
        "k8s", tmp_path, "task.train=rows/train.jsonl", "train.lr=0.002", "task.dev=/elsewhere/dev.jsonl"
    )
    config_map = next(d for d in yaml.safe_load_all(files["base.yaml"]) if d["kind"] == "ConfigMap")
    seen = run_file.parse_run_file(config_map["data"]["run.yaml"], "run.yaml", folder=Path("/etc/pi-ray"))
    assert (
        seen.task.train == "/data/inputs/my.task/rows/train.jsonl"
        and seen.task.template == "/data/inputs/my.task/template.md"
    )
    assert (seen.run_dir, seen.store, seen.train.lr, seen.train.gpu) == (
        "/data/runs/my.task", "/data/store", 0.002, True,
    )
    assert f"copy {tmp_path} to /data/inputs/my.task: the run reads its rows and template there" in notes
    assert "task.dev must be on every node under the same path" in notes


@pytest.mark.parametrize("overrides", [
    ["train.gpu=false"],
    [
        "cluster.storage_path=gs://bucket/x", "serve={min_replicas: 2, max_replicas: 5}",
        "cluster.kubernetes={service_account: reader, redis: 'redis.example:6380'}",
    ],
    [
        "cluster.prepare_resources={highmem: 1}", "cluster.serve_resources={GPU: 1, serving: 0.1}",
        "cluster.labels={serve: {pool: s}, train: {pool: t}}", "cluster.gpu_node_labels={a.b/c: d}",
        "cluster.cpu_nodes=0",
    ],
])  # fmt: skip
def test_whatever_is_asked_for_the_files_fit_their_schemas(small, tmp_path, overrides):
    for text in made("k8s", tmp_path, *overrides)[0].values():
        for resource in yaml.safe_load_all(text):
            assert (kuberay.errors if resource["apiVersion"] == "ray.io/v1" else kuberay.kubernetes_errors)(
                resource
            ) == []
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    for provider in ("aws", "gcp"):
        jsonschema.validate(
            yaml.safe_load(
                made(
                    "launcher", tmp_path, *overrides,
                    f"cluster.launcher={{provider: {provider}, project: p, ssh_from: 10.0.0.0/8, image_id: ami-1}}",
                )[0][f"{provider}.yaml"]
            ),
            schema,
        )
    if not any("://" in override for override in overrides):
        subprocess.run(["bash", "-n"], input=made("slurm", tmp_path, *overrides)[0]["run.sh"], text=True, check=True)


def test_names_that_kubernetes_cannot_have_are_changed(small, tmp_path):
    names, long = {}, "a" + "-b" * 30
    for run in ("my-task", "my.task", "my_task", "2024", "9-lives", "on", "null", "a-", long, f"{long}-b"):
        files = made("k8s", tmp_path, text=TEXT.replace("my.task", f"'{run}'"))[0]
        names[run] = yaml.safe_load(files["rayjob.yaml"])["metadata"]["name"]
        assert yaml.safe_load(files["raycronjob.yaml"])["metadata"]["name"] == f"{names[run]}-refresh"
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,22}[a-z0-9])?", names[run]), "a label of DNS-1035"
    assert len(set(names.values())) == len(names), "no two runs have one name"
    assert names["my-task"] == "my-task" and names["on"] == "on" and names["my.task"].startswith("r-my-task-")
    aws = made("launcher", tmp_path, "cluster.launcher.ssh_from=10.0.0.0/8", text=TEXT.replace("my.task", "'on'"))[0]
    found = yaml.safe_load(aws["aws.yaml"])
    assert found["cluster_name"] == found["provider"]["security_group"]["GroupName"] == "on"


def test_the_rule_that_ray_adds_to_a_security_group_is_noted_with_the_command_that_revokes_it(small, tmp_path):
    _, notes = made("launcher", tmp_path, "cluster.launcher.ssh_from=10.0.0.0/8", text=TEXT.replace("my.task", "shop"))
    (note,) = (note for note in notes if "ssh_from" in note)
    assert "revoke-security-group-ingress --region us-west-2 --protocol tcp --port 22 --cidr 0.0.0.0/0" in note
    assert "Values=shop " in note
    assert not any("ssh_from" in note for note in made("launcher", tmp_path)[1])


def test_files_send_their_reader_to_pages_that_are_there(small, tmp_path):
    made_files = (made(*kind)[0] for kind in (("k8s", tmp_path), ("launcher", tmp_path), ("launcher", tmp_path, *GCP)))
    for text in (text for files in made_files for text in files.values()):
        assert "README.md" not in text
        assert all((cluster.REPO / page).is_file() for page in re.findall(r"docs/[a-z]+\.md", text))


def test_gcp_needs_a_project(small, tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.launcher\.project is empty"):
        made("launcher", tmp_path, GCP[0])
    assert yaml.safe_load(made("launcher", tmp_path, *GCP)[0]["gcp.yaml"])["provider"]["project_id"] == "my-project"


def test_a_slurm_job_reads_the_run_with_its_overrides(small, tmp_path):
    files, notes = made("slurm", tmp_path, "train={workers: 4, batch_size: 32}", "task.dev=dev.jsonl")
    seen = run_file.parse_run_file(files["run.yaml"], "run.yaml", folder=Path("/data/inputs"))
    assert (seen.train.workers, seen.train.gpu, seen.task.dev) == (4, True, "/data/inputs/my.task/dev.jsonl")
    assert (seen.run_dir, seen.store) == ("/data/runs/my.task", "/data/store")
    assert "copy run.yaml to /data/inputs/my.task.yaml, where run.sh reads it" in notes
    assert "\nrun=/data/inputs/my.task.yaml " in files["run.sh"] and 'pi-ray run "$run" "$@"' in files["run.sh"]
    before, after = files["run.sh"].split("ray symmetric-run")
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in before, "srun does not take it from the job"
    assert '--num-cpus="$SLURM_CPUS_PER_TASK"' in after.splitlines()[0]


def test_paths_of_the_serve_block_lie_on_the_storage(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, notes = made("k8s", tmp_path, "serve.usage_dir=usage", "serve.keys_file=keys.yaml")
    text = next(d for d in yaml.safe_load_all(files["base.yaml"]) if d["kind"] == "ConfigMap")["data"]["run.yaml"]
    seen = run_file.parse_run_file(text, "run.yaml").serve
    assert (seen.usage_dir, seen.keys_file) == ("/data/usage", "/data/keys.yaml")
    assert "put the keys file at /data/keys.yaml, where serving reads it" in notes
    _, notes = made("k8s", tmp_path, "serve.keys_file=/elsewhere/keys.yaml")
    assert "serve.keys_file must be on every node under the same path" in notes


def test_nodes_offer_the_resources_that_steps_ask_for(small, tmp_path):
    asked = ["cluster.prepare_resources={CPU: 2, highmem: 1}", "cluster.train_resources={GPU: 1, fast: 0.5}"]
    found = groups(made("k8s", tmp_path, *asked)[0])
    assert (found["cpu"]["resources"], found["gpu"]["resources"]) == ({"highmem": "1000"}, {"fast": "1000"})
    types = yaml.safe_load(made("launcher", tmp_path, *asked, "train={workers: 8}")[0]["aws.yaml"])[
        "available_node_types"
    ]
    assert types["cpu"]["resources"] == {"CPU": 30, "highmem": 1000} and types["gpu"]["resources"] == {
        "CPU": 88, "GPU": 8, "fast": 1000,
    }
    assert """--resources '{"fast": 1000, "highmem": 1000}'""" in made("slurm", tmp_path, *asked)[0]["run.sh"]


def test_nodes_carry_the_labels_that_steps_are_bound_to(small, tmp_path):
    asked = [
        "cluster.labels={prepare: {pool: cheap}, train: {pool: fast}, evaluate: {ray.io/accelerator-type: A100}}",
        "train={workers: 8}",
    ]
    found = groups(made("k8s", tmp_path, *asked)[0])
    assert (found["cpu"]["labels"], found["gpu"]["labels"]) == ({"pool": "cheap"}, {"pool": "fast"}), (
        "those of Ray itself it knows"
    )
    types = yaml.safe_load(made("launcher", tmp_path, *asked, *GCP)[0]["gcp.yaml"])[
        "available_node_types"
    ]
    assert types["cpu"]["labels"] == {"pool": "cheap"} and types["gpu"]["labels"] == {"pool": "fast"}
    assert "--labels pool=fast" in made("slurm", tmp_path, *asked)[0]["run.sh"]


@pytest.mark.parametrize(
    "provider, gib, machine",
    [
        ("aws", 40, "p4d.24xlarge"), ("aws", 80, "p4de.24xlarge"), ("gcp", 40, "a2-highgpu-8g"),
        ("gcp", 80, "a2-ultragpu-8g"),
    ],
)
def test_the_machine_has_the_gpus_that_are_asked_for(small, tmp_path, provider, gib, machine):
    files, _ = made(
        "launcher", tmp_path, *GCP, f"cluster.launcher.provider={provider}", f"cluster.gpu_memory_gib={gib}",
        "train={workers: 8}",
    )
    node = yaml.safe_load(files[f"{provider}.yaml"])["available_node_types"]["gpu"]["node_config"]
    assert node.get("InstanceType", node.get("machineType")) == machine and list(files) == [f"{provider}.yaml"]


def test_a_gpu_that_no_usual_machine_has_must_be_named(small, tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.launcher\.gpu_machine"):
        made("launcher", tmp_path, "cluster.gpu_memory_gib=24")
    assert (
        "g5.48xlarge"
        in made("launcher", tmp_path, "cluster.gpu_memory_gib=24", "cluster.launcher.gpu_machine=g5.48xlarge")[0][
            "aws.yaml"
        ]
    )


def test_the_launchers_machine_is_of_no_matter_to_kubernetes_and_slurm(small, tmp_path):
    asked = "cluster={gpu_memory_gib: 24, gpus_per_node: 4}"
    assert "run.sh" in made("slurm", tmp_path, asked)[0]
    assert limits(groups(made("k8s", tmp_path, asked)[0])["gpu"])["nvidia.com/gpu"]


def test_storage_is_mounted_or_a_bucket(small, tmp_path):
    files, notes = made("launcher", tmp_path, "cluster.launcher.nfs=fs-1.example:/")
    assert "fs-1.example:/ /data" in files["aws.yaml"] and not any("mounts" in n for n in notes)
    assert any("nothing mounts /data" in n for n in made("launcher", tmp_path)[1])


def test_beside_a_bucket_jobs_copy_their_run_there_and_what_needs_a_shared_folder_is_refused(small, tmp_path):
    place = "cluster.storage_path=s3://bucket/pi-ray"
    files, _ = made("k8s", tmp_path, place, "cluster.kubernetes.service_account=reader")
    assert "PersistentVolumeClaim" not in "".join(files.values()) and list(files) == list(made("k8s", tmp_path)[0])
    assert (
        yaml.safe_load(files["raycronjob.yaml"])["spec"]["jobTemplate"]["entrypoint"]
        == "python -m pi_ray.cli.job refresh /etc/pi-ray/run.yaml"
    )
    assert (
        yaml.safe_load(files["rayjob.yaml"])["spec"]["entrypoint"]
        == "python -m pi_ray.cli.job run /etc/pi-ray/run.yaml"
    )
    base = {d["kind"]: d for d in yaml.safe_load_all(files["base.yaml"])}
    seen = run_file.parse_run_file(base["ConfigMap"]["data"]["run.yaml"], "run.yaml", folder=Path("/etc/pi-ray"))
    assert (
        seen.store == "s3://bucket/pi-ray/store"
        and seen.task.train == "s3://bucket/pi-ray/inputs/my.task/train.jsonl"
        and not seen.run_dir.startswith("s3")
    )
    reached = [
        peer["ipBlock"]["cidr"]
        for rule in base["NetworkPolicy"]["spec"]["egress"]
        for peer in rule.get("to", [])
        if "ipBlock" in peer
    ]
    assert reached == ["169.254.169.252/32", "169.254.169.254/32", "169.254.170.23/32"], (
        "where a pod's cloud identity comes from"
    )
    assert any("IamInstanceProfile" in n for n in made("launcher", tmp_path, place)[1])
    with pytest.raises(ConfigError, match="a folder that every node sees"):
        made("slurm", tmp_path, place)


def test_what_a_file_cannot_do_is_noted():
    files, notes = cluster.rendered(cluster.mixtral(), "k8s", ["serve.engine=transformers"])
    assert any("transformers holds the whole base on one GPU, and a copy takes 2 of 80 GiB" in n for n in notes)
    assert "Not on these GPUs: a copy of the base takes 2 of them" in files["rayservice.yaml"]
    assert served(files) == {"cpu": "11", "memory": "112Gi", "nvidia.com/gpu": "1"}


def served(files):
    service = next(d for d in yaml.safe_load_all(files["rayservice.yaml"]) if d["kind"] == "RayService")
    return limits(service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0])


def test_a_serving_pod_has_the_gpus_over_which_vllm_spreads_the_base(small, tmp_path):
    files, notes = cluster.rendered(cluster.mixtral(), "k8s")
    assert served(files) == {"cpu": "22", "memory": "112Gi", "nvidia.com/gpu": "2"}
    assert "Not on these GPUs" not in files["rayservice.yaml"] and not any("one GPU" in n for n in notes)
    assert "nvidia.com/gpu" not in served(made("k8s", tmp_path, "train.gpu=false", "serve.engine=vllm")[0])


@pytest.mark.parametrize("override, message", [
    ("cluster.storage_path='/data; rm -rf /'", "should match pattern"),
    ("cluster.slurm.partition=$(reboot)", "should match pattern"),
    ('cluster.slurm.setup=["a\\nb"]', "should match pattern"),
    ("cluster.kubernetes.namespace=Pi_Ray", "should match pattern"),
    ("cluster.kubernetes.redis=user:secret@redis:6379", "credentials belong in the environment"),
    ("cluster.address=http://me:secret@head:8265", "without user, password or query"),
])  # fmt: skip
def test_values_cannot_leave_their_place_or_hold_a_secret(override, message):
    with pytest.raises(ConfigError, match=message):
        run_file.parse_run_file("name: a", "t.yaml", [override])


def test_files_are_written_and_the_script_can_be_run(small, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(TEXT)
    assert (
        cli.main(
            [
                "render", "slurm", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"),
                "cluster.slurm.setup=[module load cuda]",
            ]
        )
        == 0
    )
    script = tmp_path / "out" / "run.sh"
    assert script.stat().st_mode & 0o100 and "\nmodule load cuda\n" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    assert "note: copy" in capsys.readouterr().err
    assert cli.main(["render", "k8s", str(tmp_path / "run.yaml")]) == 0
    assert {d["kind"] for d in yaml.safe_load_all(capsys.readouterr().out)} >= {
        "Namespace", "RayCluster", "RayJob", "RayCronJob", "RayService", "NetworkPolicy",
    }
    assert write_cluster_files({"a": "b"}, tmp_path / "new")[0].read_text() == "b"
    assert cli.main(["render", "k8s", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "new" / "a")]) == 10
    assert "a file stands where a folder is needed" in capsys.readouterr().err
