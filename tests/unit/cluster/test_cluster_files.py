"""The files of cluster/ are what `pi-ray render` makes, fit their published schemas, and keep to the rules of who may
reach what.
"""

import json
import re
import secrets
import subprocess
from pathlib import Path

import pytest
import yaml

from pi_ray.cluster.session import SERVE
from pi_ray.config import dump_config, run_file
from tests.golden import cluster, kuberay

pytestmark = pytest.mark.cluster
FOLDER = cluster.FOLDER
K8S = sorted((FOLDER / "k8s").glob("*.yaml"))
LAUNCHER = sorted((FOLDER / "launcher").glob("*.yaml"))
DOCUMENTS = [(path.name, d) for path in K8S for d in yaml.safe_load_all(path.read_text())]
KUBERAY = [(name, d) for name, d in DOCUMENTS if d["apiVersion"] == "ray.io/v1"]
SCRIPT = (FOLDER / "slurm" / "run.sh").read_text()
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def named(pairs):
    return {"argvalues": [d for _, d in pairs], "ids": [f"{name}-{d['kind']}" for name, d in pairs]}


def cluster_spec(resource):
    """The RayClusterSpec of any of KubeRay's kinds."""
    spec = resource["spec"].get("jobTemplate", resource["spec"])
    return spec if resource["kind"] == "RayCluster" else spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def pods(resource):
    """Every pod spec of a resource, however deep."""
    if isinstance(resource, dict):
        if "containers" in resource:
            yield resource
        for value in resource.values():
            yield from pods(value)
    elif isinstance(resource, list):
        for value in resource:
            yield from pods(value)


def test_the_image_has_the_settings_of_serve_that_a_local_ray_gets():
    assert all(f" {name}={value} \\\n" in DOCKERFILE for name, value in SERVE.items())


def test_they_are_what_render_makes_of_the_mixtral_run():
    made = cluster.files(cluster.mixtral())
    assert {p for p in FOLDER.rglob("*") if p.is_file() and p.parent != FOLDER} == set(made)
    for path, text in made.items():
        assert path.read_text() == text, (
            f"{path.relative_to(cluster.REPO)} is out of date; python -m tests.golden.cluster writes it again"
        )


@pytest.mark.parametrize("resource", **named(KUBERAY))
def test_kuberays_resources_fit_its_schema(resource):
    assert kuberay.errors(resource) == []


@pytest.mark.parametrize("resource", **named([(n, d) for n, d in DOCUMENTS if d["apiVersion"] != "ray.io/v1"]))
def test_other_resources_fit_kubernetes_own_schema(resource):
    assert kuberay.kubernetes_errors(resource) == []


@pytest.mark.parametrize("change, said", [
    (lambda s: s.update(rayVersio="2"), "'rayVersio' was unexpected"),
    (lambda s: s["authOptions"].update(mode="off"), "'off' is not one of"),
    (lambda s: s["workerGroupSpecs"][0].pop("maxReplicas"), "'maxReplicas' is a required property"),
    (lambda s: s["headGroupSpec"]["template"]["spec"]["containers"][0].update(img="x"), "'img' was unexpected"),
    (lambda s: s["headGroupSpec"]["template"]["spec"].update(hostNetwork="yes"), "'yes' is not of type"),
    (lambda s: s["autoscalerOptions"]["securityContext"].update(runAsRoot=False), "'runAsRoot' was unexpected"),
])  # fmt: skip
def test_the_schema_finds_a_mistake(change, said):
    resource = json.loads(json.dumps(next(d for _, d in KUBERAY if d["kind"] == "RayCluster")))
    change(resource["spec"])
    assert any(said in problem for problem in kuberay.errors(resource)), kuberay.errors(resource)


def test_the_compact_schema_is_made_from_a_crd(tmp_path, monkeypatch):
    """As `python -m tests.golden.kuberay` does it, from a small CRD of the same form."""
    pod = {"type": "object", "properties": {"spec": {"type": "object"}}}
    spec = {
        "type": "object", "required": ["group"], "description": "dropped",
        "properties": {
            "group": {"type": "string", "enum": ["a", "b"]}, "template": pod,
            "ports": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            "autoscalerOptions": {
                "type": "object", "properties": {"env": {"type": "array", "items": {"type": "object"}}},
            },
            "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }  # fmt: skip
    root = {
        "type": "object",
        "properties": {
            "kind": {"type": "string"}, "metadata": {"type": "object"}, "spec": spec, "status": {"type": "object"},
        },
    }
    crd = {
        "spec": {
            "group": "ray.io", "names": {"kind": "RayThing"},
            "versions": [{"name": "v1alpha1"}, {"name": "v1", "schema": {"openAPIV3Schema": root}}],
        }
    }
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    monkeypatch.setattr(kuberay, "FILE", tmp_path / "made.json")
    kuberay.main("9.9", [str(tmp_path / "crd.yaml")])
    good = {
        "apiVersion": "ray.io/v1",
        "kind": "RayThing",
        "metadata": {"name": "x"},
        "spec": {
            "group": "a", "ports": [1], "metadata": {"k": "v"},
            "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}},
        },
    }
    assert (
        kuberay.errors(good) == []
        and kuberay.errors({**good, "apiVersion": "ray.io/v1alpha1"})
        and kuberay.errors({"kind": "RayThing"})
    )
    assert len(kuberay.errors({**good, "spec": {"ports": [0], "typo": 1}})) == 3
    assert kuberay.errors({**good, "spec": {"group": "a", "template": {"spec": {}}}}) and kuberay.errors(
        {**good, "spec": {"group": "a", "autoscalerOptions": {"env": [{"value": 1}]}}}
    )


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)
def test_launcher_files_fit_rays_schema(path):
    import jsonschema
    import ray.autoscaler

    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types and set(types) == {"head", "cpu", "gpu"}
    assert config["max_workers"] == sum(t.get("max_workers", 0) for t in types.values())
    assert types["cpu"]["min_workers"] == types["gpu"]["min_workers"] == 0, "nodes come and go with the work"


# Who may reach what: the rules of cluster/README.md.


@pytest.mark.parametrize("resource", **named(KUBERAY))
def test_every_ray_cluster_wants_the_token_of_the_secret(resource):
    spec = cluster_spec(resource)
    assert spec["authOptions"] == {"mode": "token", "secretName": "pi-ray"}
    assert tuple(map(int, spec["rayVersion"].split(".")[:2])) >= (2, 52), "older ones know no token"


@pytest.mark.parametrize("resource", **named([(n, d) for n, d in DOCUMENTS if list(pods(d))]))
def test_every_pod_is_without_root_rights_and_the_hosts_network(resource):
    for pod in pods(resource):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert not any("hostPath" in v for v in pod.get("volumes", []))
        for container in pod["containers"]:
            own = container["securityContext"]
            assert (
                own["runAsNonRoot"]
                and own["runAsUser"] > 0
                and not own["allowPrivilegeEscalation"]
                and not own.get("privileged")
            )
            assert own["capabilities"] == {"drop": ["ALL"]} and own["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("resource", **named(KUBERAY))
def test_only_the_head_has_a_kubernetes_account_and_its_autoscaler_no_root_rights(resource):
    spec = cluster_spec(resource)
    assert spec["autoscalerOptions"]["securityContext"]["runAsNonRoot"]
    others = [p for p in pods(resource) if p["containers"][0]["name"] != "ray-head"]
    assert others and all(p["automountServiceAccountToken"] is False for p in others)


def test_no_service_is_open_to_the_world():
    services = [d["spec"].get("type", "ClusterIP") for _, d in DOCUMENTS if d["kind"] == "Service"] + [
        cluster_spec(d)["headGroupSpec"]["serviceType"] for _, d in KUBERAY
    ]
    assert set(services) == {"ClusterIP"}
    assert not any(
        word in path.read_text() for path in K8S for word in ("LoadBalancer", "NodePort", "Ingress\n", "enableIngress")
    )


def test_the_network_policy_covers_every_pod_and_lets_clients_reach_the_serving_port_alone():
    policy = next(d for _, d in DOCUMENTS if d["kind"] == "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    label = policy["podSelector"]["matchLabels"].items()
    templates = [t for _, d in DOCUMENTS for t in _templates(d)]
    assert len(templates) == len([p for _, d in DOCUMENTS for p in pods(d)]) and all(
        label <= t["metadata"]["labels"].items() for t in templates
    )
    open_to = {
        json.dumps(peer, sort_keys=True): [p["port"] for p in rule.get("ports", [])]
        for rule in policy["ingress"]
        for peer in rule["from"]
    }
    assert open_to == {
        json.dumps({"podSelector": {"matchLabels": dict(label)}}): [],
        json.dumps(
            {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
        ): [8265, 52365, 8000],
        json.dumps({"podSelector": {"matchLabels": {"pi-ray/client": "true"}}}): [8000],
    }
    assert all(rule.get("to") or {p["port"] for p in rule["ports"]} == {443, 6443} for rule in policy["egress"])


def _templates(resource):
    if isinstance(resource, dict):
        if "containers" in resource.get("spec", {}):
            yield resource
        for value in resource.values():
            yield from _templates(value)
    elif isinstance(resource, list):
        for value in resource:
            yield from _templates(value)


def test_the_service_survives_its_head_and_is_upgraded_blue_green():
    spec = next(d for _, d in KUBERAY if d["kind"] == "RayService")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"} and spec["excludeHeadPodFromServeSvc"]
    store = spec["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert store["redisAddress"] == "pi-ray-redis:6379" and store["redisPassword"] == {
        "valueFrom": {"secretKeyRef": {"name": "pi-ray", "key": "redis_password"}}
    }
    assert spec["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] >= 1
    redis = next(d for n, d in DOCUMENTS if d["kind"] == "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert "REDIS_PASSWORD" not in "".join(redis["command"][:2]) and redis["command"][2].endswith(
        "| exec redis-server -"
    ), "the password is no argument of the server"


def test_the_services_configuration_is_serves_own(monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    spec = next(d for _, d in KUBERAY if d["kind"] == "RayService")["spec"]
    serve = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    assert (
        serve.applications[0].import_path == "pi_ray.serve.app:deploy"
        and serve.applications[0].args["run"] == "/etc/pi-ray/run.yaml"
    )
    pod = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    assert pod["metadata"]["annotations"] == {"pi-ray/run-file": serve.applications[0].args["version"]}, (
        "another run file is another cluster, and read again"
    )
    worker = pod["spec"]["containers"][0]
    assert {"name": "PI_RAY_API_KEY", "valueFrom": {"secretKeyRef": {"name": "pi-ray", "key": "api_key"}}} in worker[
        "env"
    ]


def test_what_is_scheduled_starts_from_the_last_adapter():
    cron = next(d for _, d in KUBERAY if d["kind"] == "RayCronJob")["spec"]
    assert (
        cron["jobTemplate"]["entrypoint"] == "pi-ray refresh /etc/pi-ray/run.yaml"
        and len(cron["schedule"].split()) == 5
    )
    job = next(d for _, d in KUBERAY if d["kind"] == "RayJob")["spec"]
    assert (
        job["entrypoint"] == "pi-ray run /etc/pi-ray/run.yaml"
        and job["shutdownAfterJobFinishes"]
        and job["backoffLimit"] == 2
    )


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)
def test_the_launcher_starts_ray_with_a_token_and_its_dashboard_on_loopback(path):
    config = yaml.safe_load(path.read_text())
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}, "a path, not its text"
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "ray start" not in command or "RAY_AUTH_MODE=token ray start" in command
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in path.read_text()
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"] and not any(
        "privileged" in o or "--network" in o for o in config["docker"]["run_options"]
    )


def test_the_slurm_script_keeps_the_token_in_a_file_of_ones_own():
    assert (
        "export RAY_AUTH_MODE=token" in SCRIPT
        and "umask 077" in SCRIPT
        and 'chmod 600 "$RAY_AUTH_TOKEN_PATH"' in SCRIPT
    )
    assert "RAY_AUTH_TOKEN=" not in SCRIPT and "dashboard-host" not in SCRIPT, "Ray's own default is loopback"
    assert "ray symmetric-run --address" in SCRIPT and "--nodes=2" in SCRIPT and "--gpus-per-node=8" in SCRIPT


STUBS = {
    "scontrol": 'echo node1; echo node2', "hostname": 'echo 10.0.0.7',
    "ray": 'printf "%s\\n" "$@" >"$OUT/args"; env >"$OUT/env"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo "$*" >>"$OUT/srun"; exec "$@"',
}  # fmt: skip


def test_the_slurm_script_starts_ray_on_every_node_and_shows_the_token_to_nobody(tmp_path):
    """With stand-ins for Slurm's commands and Ray's, which write down what they are given."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "OUT": str(tmp_path), "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "88",
    }
    done = subprocess.run(
        ["bash", FOLDER / "slurm" / "run.sh", "train.lr=0.001"], env=environment, capture_output=True, text=True,
        check=True,
    )
    args = (tmp_path / "args").read_text().split("\n")
    assert args[:5] == ["symmetric-run", "--address", "10.0.0.7:20123", "--min-nodes", "2"]
    assert args[5:7] == ["--num-cpus=88", "--num-gpus=8"]
    assert "SRUN_CPUS_PER_TASK=88" in (tmp_path / "env").read_text()
    assert args[args.index("--") + 1 :] == [
        "env", "RAY_ADDRESS=10.0.0.7:20123", "pi-ray", "run", "/shared/inputs/mixtral-8x7b.yaml",
        "train.lr=0.001", "",
    ]
    token = tmp_path / ".ray" / "auth_token"
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text()) and token.stat().st_mode & 0o777 == 0o600
    assert "RAY_AUTH_MODE=token" in (tmp_path / "env").read_text()
    for text in (
        done.stdout, done.stderr, (tmp_path / "args").read_text(), (tmp_path / "srun").read_text(),
        (tmp_path / "env").read_text(),
    ):
        assert token.read_text() not in text


def test_the_image_is_for_cpus_or_cuda_and_not_roots():
    stages = re.findall(r"^FROM .+$", DOCKERFILE, re.M)
    assert len(stages) == 2 and stages[0].endswith("AS build")
    assert "ARG DEVICE=cuda" in DOCKERFILE and "cpu) pip install torch --index-url" in DOCKERFILE
    last = DOCKERFILE.rsplit(stages[1], 1)[1]
    assert re.findall(r"^USER (.+)$", last, re.M) == ["1000:1000"] and "RAY_AUTH_MODE=token" in last
    assert " gcc libc6-dev " in last, "Triton compiles with it on a GPU node"
    assert "pip install" not in last and not re.search(r"^(ENV|ARG) .*(TOKEN|KEY|PASSWORD|SECRET)", DOCKERFILE, re.M)
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    copied = {w for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for w in line.split()}
    assert ignored[0] == "*" and {f"!{name}" for name in copied} <= set(ignored), (
        "what is copied, and nothing else, is sent to the builder"
    )


def test_no_file_holds_a_secret():
    for path in (*K8S, *LAUNCHER, FOLDER / "slurm" / "run.sh", FOLDER / "Dockerfile", FOLDER / "README.md"):
        text = path.read_text()
        assert not re.search(
            r"\b[0-9a-f]{32,}\b|-----BEGIN|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}", text
        ), path
        assert not [
            d for d in (yaml.safe_load_all(text) if path.suffix == ".yaml" else []) if d.get("kind") == "Secret"
        ], "a Secret is made by hand"
    for _, document in DOCUMENTS:
        for pod in pods(document):
            for variable in (e for c in pod["containers"] for e in c.get("env", [])):
                assert not re.search("TOKEN|KEY|PASSWORD|SECRET", variable["name"]) or set(variable) == {
                    "name", "valueFrom",
                }, variable


def test_secrets_of_the_environment_reach_no_file_and_no_dump(monkeypatch):
    planted = {
        name: secrets.token_hex(16)
        for name in (
            "RAY_AUTH_TOKEN", "PI_RAY_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "REDIS_PASSWORD", "AWS_SECRET_ACCESS_KEY",
        )
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    config = run_file.load_run_file(cluster.RUN)
    written = [dump_config(config), config.model_dump_json(), *cluster.files(cluster.mixtral()).values()]
    assert not [name for name, value in planted.items() for text in written if value in text]
