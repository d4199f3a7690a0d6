"""Resumable training state: `checkpoints/step-00000040/` with state.safetensors (weights, Adam moments) and hashes in the manifest.

Independent of world size and ZeRO stage. The newest whole checkpoint of the same configuration wins; a damaged one is set aside.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pi_ray.errors import CorruptArtifactError, TrainingError
from pi_ray.run.artifact import read_manifest, staged, sweep, verify

log = logging.getLogger(__name__)

STATE, BEST = "state.safetensors", "best.safetensors"
SHOWN = 8  # changed keys named in an error

State = dict[str, torch.Tensor]


def save(folder: Path, state: State, done: int, fingerprint: str, keep: int, best: State | None = None, **facts: Any) -> Path:
    """Write the state after `done` updates and drop all but the newest `keep` checkpoints.

    `best` is a second state, kept beside it; `facts` go into the manifest. Raises StorageError when the disk does not take it.
    """
    from safetensors.torch import save_file

    path = folder / f"step-{done:08d}"
    with staged(path, fingerprint=fingerprint, done=done, **facts) as tmp:
        for name, tensors in ((STATE, state), (BEST, best)):
            if tensors is not None:
                save_file({k: v.contiguous() for k, v in tensors.items()}, tmp / name)
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
    sweep(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def newest(folder: Path, fingerprint: str, learned_from: dict[str, Any] | None = None, warn: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint whose every hash holds. Damaged ones are renamed to *.corrupt, and `warn` is told file and hashes.

    Raises TrainingError when a whole checkpoint belongs to another configuration; `learned_from` (dotted key -> value) says what has changed.
    """
    for path in checkpoints(folder):
        try:
            manifest = verify(path)
        except CorruptArtifactError as error:
            aside = path.with_name(path.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            warn(f"checkpoint set aside as {aside.name}: {error}")
            continue
        if manifest["fingerprint"] != fingerprint:
            raise TrainingError(
                f"{path} was made with another configuration (fingerprint {manifest['fingerprint'][:12]}, now {fingerprint[:12]}){_changed(manifest, learned_from or {})}; "
                "set it back to go on, take another run_dir or name, or delete the checkpoints folder to train again"
            )
        return path
    return None


def _changed(manifest: dict[str, Any], now: dict[str, Any]) -> str:
    before = manifest.get("learned_from") or {}
    if not before or not now:
        return ""
    keys = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if not keys:
        return ", though every key is the same: rows, template or the version of pi-ray differ"
    return ": " + ", ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more keys" if len(keys) > SHOWN else "")


def load(path: Path) -> tuple[State, dict[str, Any]]:
    """(state, manifest) of a verified checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / STATE), read_manifest(path)


def load_best(path: Path) -> State | None:
    """The second state of a verified checkpoint, if it has one."""
    from safetensors.torch import load_file

    return load_file(path / BEST) if (path / BEST).exists() else None
