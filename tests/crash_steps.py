"""The steps of a run that must survive a death at any point, on a tiny model: prepare, train, publish and release.

Each works in a root that holds run/ and store/. `make_ready` brings a root to where a step begins, `outcome` is what
must be the same after a death and another try as without it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pi_ray.config import RunConfig
from pi_ray.run.artifact import MANIFEST, TEMPORARY, digest, digest_file, verify_artifact
from pi_ray.run.directory import RunDir
from tests.prepared import prepare_by_hand, tiny_config

SETTINGS = {
    "schedule.shots": 0, "train.objective": "distill", "train.distill.top_k": 4, "train.distill.agreement": "off",
    "train.checkpoint_every": 4,
}


def config_of(root: Path) -> RunConfig:
    return RunConfig.model_validate(json.loads((root / "config.json").read_text()))


def train(root: Path) -> None:
    from pi_ray.train.trainer import train_worker
    from tests.unit.train.test_train import settings

    train_worker(settings(config_of(root)))


def publish(root: Path) -> None:
    from pi_ray.store.publish import publish_adapter

    config = config_of(root)
    publish_adapter(RunDir(config.root), config)


def release(root: Path) -> None:
    """Version 2, which was a canary, for everyone."""
    from pi_ray.store.adapters import AdapterStore
    from pi_ray.store.release import release_version

    release_version(AdapterStore(config_of(root).store), "tiny", version="v0002")


def prepare(root: Path) -> None:
    """Preparation's driver on the Ray cluster that RAY_ADDRESS names, whose workers outlive it."""
    from pi_ray.cluster import session
    from pi_ray.data.prepare import prepare

    session.connect()
    prepare(config_of(root))


STEPS: dict[str, Callable[[Path], None]] = {"train": train, "publish": publish, "release": release}


def make_ready_to_prepare(root: Path) -> Path:
    """A root with a task of its own, at the beginning of a run."""
    (root / "task").mkdir(parents=True)
    for split, count in (("train", 12), ("dev", 4), ("test", 4)):
        rows = [{"query": f"{split} {i}: which code?", "answer": f"code k{i % 5} | {i}"} for i in range(count)]
        (root / "task" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "task" / "template.md").write_text("# Instruction\n\nAnswer with one code of k0 to k4.\n")
    files = {name: str(root / "task" / f"{name}.jsonl") for name in ("train", "dev", "test")}
    config = {
        "name": "tiny", "task": {**files, "template": str(root / "task" / "template.md")},
        "prompt": {"chat": "chatml"}, "compress": {"name": "none"}, "schedule": {"phases": 2, "shots": 1},
    }
    (root / "config.json").write_text(json.dumps(config))
    _move(root)
    return root


def make_ready(folder: Path, model: Path) -> dict[str, Path]:
    """A root at the beginning of each step after preparation, made once; a death is tried on copies of them."""
    from pi_ray.store.adapters import AdapterStore
    from pi_ray.store.release import release_version

    roots = {name: folder / name for name in STEPS}
    config = tiny_config(model, roots["train"] / "run", store=str(roots["train"] / "store"), **SETTINGS)
    prepare_by_hand(config)
    (roots["train"] / "config.json").write_text(config.model_dump_json())
    shutil.copytree(roots["train"], roots["publish"])
    _move(roots["publish"])
    train(roots["publish"])
    shutil.copytree(roots["publish"], roots["release"], symlinks=True)
    _move(roots["release"])
    publish(roots["release"])
    second = roots["release"] / "store" / "tiny" / "v0002"
    shutil.copytree(second.with_name("v0001"), second)
    store = AdapterStore(roots["release"] / "store")
    release_version(store, "tiny", version="v0001")
    release_version(store, "tiny", version="v0002", canary=10)
    return roots


def copy_root(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    _move(target)
    return target


def _move(root: Path) -> None:
    """Have a copied root name its own folders."""
    content = json.loads((root / "config.json").read_text())
    content |= {"run_dir": str(root / "run"), "store": str(root / "store")}
    (root / "config.json").write_text(json.dumps(content))


def outcome(root: Path) -> dict[str, Any]:
    """Weights, answers, losses, versions and aliases, and whether anything half made is left."""
    run, store = RunDir(root / "run"), root / "store"
    found: dict[str, Any] = {}
    for folder in sorted(path.parent for path in run.root.rglob(MANIFEST)) if (root / "task").is_dir() else []:
        found[folder.relative_to(run.root).as_posix()] = verify_artifact(folder)["files"]
    for folder in sorted(run.adapters.glob("phase-*")) if run.adapters.is_dir() else []:
        found[folder.name] = verify_artifact(folder)["files"]["adapter_model.safetensors"]["sha256"]
    if run.best.is_dir():
        found["best"] = run.best.name
    if run.teacher_answers.is_dir():
        verify_artifact(run.teacher_answers)
        tables = (pq.read_table(path).to_pylist() for path in sorted(run.teacher_answers.glob("*.parquet")))
        found["answers"] = digest([*tables])
    if run.train_log.is_file():
        entries = map(json.loads, run.train_log.read_text().splitlines())
        found["losses"] = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    for folder in sorted(store.glob("*/v*")):
        files = verify_artifact(folder)["files"]
        found[f"{folder.parent.name}@{folder.name}"] = files["adapter_model.safetensors"]["sha256"]
    for file in sorted(store.glob("*/*.json")):
        found[file.name] = digest_file(file)
    found["left"] = sorted(p.name for p in root.rglob(".*") if TEMPORARY.fullmatch(p.name))
    return found
