"""The files of cluster/: `pi-ray render` for jobs/runs/mixtral-8x7b.yaml, on AWS and on GCP.

    python -m tests.golden.cluster

writes them again. The shape of Mixtral-8x7B is transformers' default, so that no hub is asked, and Ray's version is the
one below, whichever is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from unittest.mock import patch

from pi_ray.cluster.render import KINDS, render_cluster_files, write_cluster_files
from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.config.run_file import load_run_file
from pi_ray.plan import estimate
from pi_ray.train.base_size import BaseSize

REPO = Path(__file__).parents[2]
FOLDER = REPO / "cluster"
RUN = REPO / "jobs" / "runs" / "mixtral-8x7b.yaml"
RAY = "2.60.0"


@cache
def mixtral() -> estimate.ModelSize:
    from transformers import MixtralConfig

    with tempfile.TemporaryDirectory() as folder:
        MixtralConfig(sliding_window=None).save_pretrained(folder)
        return estimate.model_size(ModelConfig(base=folder), LoraConfig(rank=32))


def rendered(size: estimate.ModelSize, kind: str, overrides: Sequence[str] = ()) -> tuple[dict[str, str], list[str]]:
    """(file -> text, notes) of one kind for the Mixtral run."""
    counts = BaseSize(size.weights, size.linear, 2 * size.key_value * size.layers)
    with (
        patch.object(estimate, "model_size", lambda model, lora: size),
        patch("pi_ray.cluster.render.version", lambda name: RAY),
        patch("pi_ray.train.replicas.base_size", lambda model: counts),
    ):
        return render_cluster_files(kind, load_run_file(RUN, overrides), RUN.parent)


def files(size: estimate.ModelSize) -> dict[Path, str]:
    """Every file of cluster/ that is rendered."""
    gcp = rendered(size, "launcher", ["cluster.launcher.provider=gcp", "cluster.launcher.project=my-project"])[0]
    found = {kind: rendered(size, kind)[0] | (gcp if kind == "launcher" else {}) for kind in KINDS}
    return {FOLDER / kind / name: text for kind, texts in found.items() for name, text in texts.items()}


if __name__ == "__main__":
    for path, text in files(mixtral()).items():
        write_cluster_files({path.name: text}, path.parent)
        print(f"wrote {path.relative_to(REPO)}")
