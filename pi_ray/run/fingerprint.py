"""Fingerprints: hashes of what a step's output depends on, by which the step knows that it is done.

A change of `serve.port` retrains nothing. Preparation has one fingerprint for all that it makes: a change of `retrieve` makes templates and
documents again too, from the cache of compressed text.
"""

from __future__ import annotations

from typing import Any

from pi_ray import __version__
from pi_ray.config import INPUTS, RunConfig
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import digest
from pi_ray.run.phases import max_shots
from pi_ray.schedule import plan_phases

# Keys of `train` that do not change what is learned. workers and micro_batch only spread the rows of an update, which
# changes rounding alone: a run may go on with others.
UNLEARNED = {
    "max_failures", "keep_checkpoints", "checkpoint_every", "collective_timeout_s", "tracker", "attention", "workers",
    "micro_batch",
}


def prepare_fingerprint(config: RunConfig, task_fingerprint: str) -> str:
    phases = [(p.rate, p.shots) for p in plan_phases(config.schedule)]
    made_from = [__version__, task_fingerprint, _dump(config, "task", "model", "prompt", "compress", "retrieve"), phases, max_shots(config)]
    return digest([*made_from, UNLABELLED] if wants_unlabelled(config) else made_from)


def wants_unlabelled(config: RunConfig) -> bool:
    """Whether a teacher answers queries that have no answer."""
    return config.train.objective != "sft"


def train_fingerprint(config: RunConfig, prepare: str) -> str:
    return digest([prepare, _learned(config), [(p.rate, p.shots, p.epochs, p.steps) for p in plan_phases(config.schedule)]])


def _learned(config: RunConfig) -> dict[str, Any]:
    """The keys of `train` that change what is learned."""
    distill = set() if wants_unlabelled(config) else {"distill"}
    dev_every = set() if config.train.early_stop else {"dev_every"}
    return config.train.model_dump(mode="json", exclude=UNLEARNED | distill | dev_every)


def learning_settings(config: RunConfig) -> dict[str, Any]:
    """What an adapter depends on besides rows and template, as dotted key -> value: for saying what has changed."""
    return _flat({**_dump(config, "task", "model", "prompt", "compress", "retrieve", "schedule"), "train": _learned(config)})


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}" if key else name).items()}


def evaluate_fingerprint(config: RunConfig, columns: list[tuple[str, str]]) -> str:
    """`columns` are (name, fingerprint of the adapter, or of the rows for the bare base)."""
    return digest([columns, _dump(config, "evaluate")])


def _dump(config: RunConfig, *blocks: str) -> dict[str, Any]:
    """Those blocks without the paths of rows and template: the task's fingerprint has what is in these files, and a project may be moved."""
    return {b: getattr(config, b).model_dump(mode="json", exclude=set(INPUTS) if b == "task" else None) for b in blocks}
