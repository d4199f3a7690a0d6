"""`pi-ray render`: the files that make a cluster (k8s: KubeRay, launcher: `ray up`, slurm), filled from a run file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from pi_ray.cluster.render.values import template_values
from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError
from pi_ray.run.artifact import write_atomic

KINDS = {
    "k8s": ("base.yaml", "raycluster.yaml", "rayjob.yaml", "raycronjob.yaml", "rayservice.yaml"),
    "launcher": ("aws.yaml", "gcp.yaml"),
    "slurm": ("run.sh",),
}


def render_cluster_files(kind: str, config: RunConfig, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Render the files of a kind: (file name -> text, notes for the person). `folder` holds the run file.

    Of the launcher's files, only the one of cluster.launcher.provider. Raises ConfigError as `template_values`, and for
    storage behind a URL that Slurm's nodes cannot use.
    """
    import jinja2

    values, notes = template_values(config, folder.resolve())
    storage, launcher = values["storage"], config.cluster.launcher
    if kind == "slurm" and not values["mounted"]:
        raise ConfigError(
            f"cluster.storage_path is {storage}: a Slurm job keeps its run in a folder that every node sees, such "
            "as /shared; name that one"
        )
    if kind == "launcher" and not values["mounted"]:
        notes.append(
            f"the workers need the right to read and write {storage}: Ray gives a role to the head alone, so name "
            "theirs in node_config (AWS: IamInstanceProfile, GCP: serviceAccounts)"
        )
    elif kind == "launcher" and not launcher.nfs:
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
    """Write the files into `folder`, which is made, and return their paths."""
    paths = [write_atomic(folder / name, text) for name, text in found.items()]
    for script in (path for path in paths if path.suffix == ".sh"):
        script.chmod(0o755)
    return paths
