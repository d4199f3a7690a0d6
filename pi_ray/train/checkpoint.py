"""Resumable training state in `checkpoints/step-00000040/`, hashed and independent of world size and ZeRO stage."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pi_ray.errors import CorruptArtifactError, TrainingError
from pi_ray.run.artifact import (
    CORRUPT,
    discard_folder,
    read_manifest,
    remove_leftovers,
    set_aside,
    staged,
    verify_artifact,
)

log = logging.getLogger(__name__)
STATE, BEST = "state.safetensors", "best.safetensors"
KEYS_SHOWN = 8  # changed keys named in an error
State = dict[str, torch.Tensor]


def save_checkpoint(
    folder: Path, state: State, done: int, fingerprint: str, keep: int, best: State | None = None, **facts: Any
) -> Path:
    """Write the state after `done` updates, beside it the `best` one (early stop); keep the newest `keep` checkpoints.

    `facts` go into the manifest. Raises StorageError on a full disk.
    """
    path = folder / f"step-{done:08d}"
    with staged(path, fingerprint=fingerprint, done=done, **facts) as tmp:
        for name, tensors in ((STATE, state), (BEST, best)):
            if tensors is not None:
                save_file({k: v.contiguous() for k, v in tensors.items()}, tmp / name)
    for old in list_checkpoints(folder)[keep:]:
        discard_folder(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first; without temporary and *.corrupt folders."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and p.suffix != CORRUPT), reverse=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished run. Damaged ones stay to be looked at."""
    for path in list_checkpoints(folder):
        discard_folder(path)
    remove_leftovers(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def newest_checkpoint(
    folder: Path, fingerprint: str, learned_from: dict[str, Any] | None = None,
    warn: Callable[[str], None] = log.warning,
) -> Path | None:
    """The newest checkpoint whose hashes hold. Damaged ones are renamed to *.corrupt; `warn` gets file and hashes.

    Raises TrainingError when it belongs to another configuration, and names the keys of `learned_from` (dotted key ->
    value) that have changed.
    """
    for path in list_checkpoints(folder):
        try:
            manifest = verify_artifact(path)
        except CorruptArtifactError as error:
            set_aside(path, error, warn)
            continue
        if manifest["fingerprint"] != fingerprint:
            raise TrainingError(
                f"{path} was made with another configuration (fingerprint {manifest['fingerprint'][:12]}, "
                f"now {fingerprint[:12]}){_changed_keys(manifest.get('learned_from') or {}, learned_from or {})}; "
                "set it back to go on, take another run_dir or name, or delete the checkpoints folder to train again"
            )
        return path
    return None


def _changed_keys(old: dict[str, Any], new: dict[str, Any]) -> str:
    if not old or not new:
        return ""
    keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if not keys:
        return ", though every key is the same: rows, template or the version of pi-ray differ"
    shown = ", ".join(f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in keys[:KEYS_SHOWN])
    return f": {shown}" + (f" and {len(keys) - KEYS_SHOWN} more keys" if len(keys) > KEYS_SHOWN else "")


def load_checkpoint(path: Path) -> tuple[State, State | None, dict[str, Any]]:
    """(state, best state if there is one, manifest) of a verified checkpoint."""
    best = load_file(path / BEST) if (path / BEST).exists() else None
    return load_file(path / STATE), best, read_manifest(path) or {}
