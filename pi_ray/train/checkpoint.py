"""Resumable training state: `checkpoints/step-00000040/` with state.safetensors (weights, Adam moments) and hashes in the manifest.

Independent of world size and ZeRO stage. The newest whole checkpoint of the same configuration wins; a damaged one is set aside.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from pi_ray.artifact import read_manifest, staged, verify
from pi_ray.errors import CorruptArtifactError, TrainingError

log = logging.getLogger(__name__)


def save(folder: Path, state: dict[str, torch.Tensor], done: int, fingerprint: str, keep: int) -> Path:
    """Write the state after `done` updates and drop all but the newest `keep` checkpoints."""
    from safetensors.torch import save_file

    path = folder / f"step-{done:08d}"
    with staged(path, fingerprint=fingerprint, done=done) as tmp:
        save_file({k: v.contiguous() for k, v in state.items()}, tmp / "state.safetensors")
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Newest first; without temporary and set-aside ones."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".corrupt"), reverse=True)


def clear(folder: Path) -> None:
    """Remove the checkpoints of a finished run: its adapters are what it was for. Damaged ones stay to be looked at."""
    for path in checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def newest(folder: Path, fingerprint: str) -> Path | None:
    """The newest checkpoint whose every hash holds. Damaged ones are renamed to *.corrupt with a warning.

    Raises TrainingError when a whole checkpoint belongs to another configuration.
    """
    for path in checkpoints(folder):
        try:
            manifest = verify(path)
        except CorruptArtifactError as error:
            aside = path.with_name(path.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("checkpoint set aside as %s: %s", aside.name, error)
            continue
        if manifest["fingerprint"] != fingerprint:
            raise TrainingError(
                f"{path} was made with another configuration (fingerprint {manifest['fingerprint'][:12]}, now {fingerprint[:12]}); "
                "take another run_dir or name, or delete the checkpoints folder to train again"
            )
        return path
    return None


def load(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """(state, updates done) of a verified checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / "state.safetensors"), read_manifest(path)["done"]
