"""Fills the templates beside this file: k8s (KubeRay), launcher (`ray up`), slurm."""

from __future__ import annotations

import json
import shlex
from importlib.resources import files
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

    Of the launcher's files, only the one of cluster.launcher.provider.
    """
    import jinja2

    if kind not in KINDS:
        raise ConfigError(f"'{kind}': choose one of {', '.join(KINDS)}")
    known, notes = template_values(config, folder.resolve())
    loader = jinja2.FunctionLoader(lambda name: files(__package__).joinpath(kind, name).read_text(encoding="utf-8"))
    # No HTML: the filters below quote values for YAML and for the shell; other values are limited to plain characters.
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )
    environment.filters["q"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    provider = config.cluster.launcher.provider
    wanted = [name for name in KINDS[kind] if kind != "launcher" or name.startswith(provider)]
    if not known["mounted"]:
        _note_bucket(kind, known["storage"], notes)
    if kind == "launcher" and known["mounted"] and not config.cluster.launcher.nfs:
        cure = "name an NFS server in cluster.launcher.nfs, or a bucket in cluster.storage_path"
        notes.append(f"nothing mounts {known['storage']} on the machines: {cure}")
    return {name: environment.get_template(f"{name}.j2").render(known) for name in wanted}, notes


def _note_bucket(kind: str, storage: str, notes: list[str]) -> None:
    """Add a note on the rights that storage behind a URL needs. Raises ConfigError for Slurm, which cannot use it."""
    if kind == "slurm":
        raise ConfigError(
            f"cluster.storage_path is {storage}: a Slurm job keeps its run in a folder that every node sees, such "
            "as /shared; name that one"
        )
    if kind == "launcher":
        notes.append(
            f"the workers need the right to read and write {storage}: Ray gives a role to the head alone, so name "
            "theirs in node_config (AWS: IamInstanceProfile, GCP: serviceAccounts)"
        )


def write_cluster_files(found: dict[str, str], folder: Path) -> list[Path]:
    """Write the files into `folder`, which is made, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in found.items():
        write_atomic(folder / name, text)
        if name.endswith(".sh"):
            (folder / name).chmod(0o755)
    return [folder / name for name in found]
