"""KubeRay's custom resources as a compact schema, kuberay.json, and a check against it.

    python -m tests.golden.kuberay VERSION ray.io_rayclusters.yaml ray.io_rayjobs.yaml ray.io_raycronjobs.yaml
    ray.io_rayservices.yaml

makes it from KubeRay's CRD files (helm-chart/kuberay-operator/crds). What it keeps of them: names, types, enums,
limits, what is required; a name that is not there is an error. Where a CRD repeats a type of Kubernetes itself, such as
a pod template, the type's name stands alone, and Kubernetes' own schema is asked.

A file may have those types cut down to their `type`, and its status and descriptions left out; then FILE@WHERE says
where its text was read: the commit, mostly.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("kuberay.json")
KUBERNETES = {
    "template": "PodTemplateSpec", "submitterPodTemplate": "PodTemplateSpec", "headService": "Service",
    "serveService": "Service", "valueFrom": "EnvVarSource",
    "autoscalerOptions.resources": "ResourceRequirements", "autoscalerOptions.securityContext": "SecurityContext",
    "autoscalerOptions.env": "EnvVar",
    "autoscalerOptions.envFrom": "EnvFromSource", "autoscalerOptions.volumeMounts": "VolumeMount",
    "metadata": "ObjectMeta",
}  # fmt: skip
KEPT = ("type", "enum", "minimum", "maximum", "minItems", "pattern", "required")


def compact(node: dict[str, Any], name: str = "", parent: str = "") -> dict[str, Any]:
    """An OpenAPI v3 schema of a CRD as JSON Schema without descriptions, in which no other key may stand."""
    kind = KUBERNETES.get(f"{parent}.{name}") or KUBERNETES.get(name)
    if kind and not (name == "metadata" and "additionalProperties" in node):  # a RayJob's own metadata are strings
        return {"type": node["type"], "kubernetes": kind}
    found = {key: node[key] for key in KEPT if key in node}
    for rule in (r["rule"] for r in node.get("x-kubernetes-validations", [])):
        if rule.startswith("self in ["):  # an enum in other words
            found["enum"] = ast.literal_eval(rule.removeprefix("self in "))
    if "properties" in node:
        found["properties"] = {
            key: compact(value, key, name) for key, value in node["properties"].items() if key != "status"
        }
        found["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        found["additionalProperties"] = compact(node["additionalProperties"], parent=name)
    if "items" in node:
        found["items"] = compact(node["items"], parent=name)
    return found


def errors(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a RayCluster, RayJob, RayCronJob or RayService, pod templates and all."""
    import jsonschema

    schema = json.loads(FILE.read_text())["kinds"][resource["kind"]]
    wrong = [
        f"{'.'.join(map(str, e.path))}: {e.message}"
        for e in jsonschema.Draft202012Validator(schema).iter_errors(resource)
    ]
    return wrong + [
        problem for kind, value in _kubernetes(schema, resource) for problem in kubernetes_errors(_wrapped(kind, value))
    ]


def kubernetes_errors(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a resource of Kubernetes itself; unknown keys are errors too."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{resource['kind']} {'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _kubernetes(schema: dict[str, Any], value: Any) -> Iterator[tuple[str, Any]]:
    """(type's name, value) of every part whose schema is Kubernetes' own."""
    if "kubernetes" in schema:
        yield from ((schema["kubernetes"], v) for v in (value if schema["type"] == "array" else [value]))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _kubernetes(
                schema.get("properties", {}).get(key) or schema.get("additionalProperties") or {}, part
            )
    elif isinstance(value, list):
        for part in value:
            yield from _kubernetes(schema.get("items", {}), part)


def _wrapped(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    """A whole resource around a part, since Kubernetes' schemas are of whole ones."""
    container = {"name": "c", "image": "i"}
    around = {
        "ResourceRequirements": {"resources": value}, "SecurityContext": {"securityContext": value},
        "EnvVar": {"env": [value]}, "EnvFromSource": {"envFrom": [value]}, "VolumeMount": {"volumeMounts": [value]},
        "EnvVarSource": {"env": [{"name": "n", "valueFrom": value}]},
    }
    if kind == "Service":
        return {"apiVersion": "v1", "kind": "Service", **value}
    meta = value if kind == "ObjectMeta" else {"name": "x"}
    template = value if kind == "PodTemplateSpec" else {"spec": {"containers": [container | around.get(kind, {})]}}
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": meta, "template": template}


def main(version: str, paths: list[str]) -> None:
    import yaml

    kinds, source = {}, {}
    for path, _, where in (p.partition("@") for p in paths):
        text = Path(path).read_bytes()
        spec = yaml.safe_load(text)["spec"]
        served = next(v for v in spec["versions"] if v["name"] == "v1")
        kind, root = spec["names"]["kind"], compact(served["schema"]["openAPIV3Schema"])
        root["properties"] |= {"apiVersion": {"enum": [f"{spec['group']}/v1"]}, "kind": {"enum": [kind]}}
        # what the API server asks of every resource
        kinds[kind] = root | {"required": ["apiVersion", "kind", "metadata", "spec"]}
        source[Path(path).name] = where or f"sha256 {hashlib.sha256(text).hexdigest()}"
    FILE.write_text(json.dumps({"kuberay": version, "source": source, "kinds": kinds}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
