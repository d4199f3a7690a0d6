"""Tokens that pass through the model in each update of a prepared run: the work by which time left is foretold."""

from __future__ import annotations

from pi_ray.config import RunConfig
from pi_ray.plan import estimate
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import numbered_phases
from pi_ray.train.batches import longest_row_tokens
from pi_ray.train.updates import updates_in_phase


def tokens_of_updates(config: RunConfig) -> list[float]:
    """One mean for each update, in order. A prefix that a worker's rows share counts once a worker."""
    run, train = RunDir(config.root), config.train
    size = estimate.model_size(config.model, train.lora, longest_row_tokens(run.phases))
    prefixes = train.workers if estimate.shares_prefix(size, config) else train.batch_size
    tokens_by_update: list[float] = []
    for i, phase in numbered_phases(config):
        manifest = read_manifest(run.phase(i)) or {}
        tokens = manifest["tokens"]
        work = prefixes * tokens["prefix"] + train.batch_size * (tokens["row_mean"] + tokens["label_mean"] - 1)
        tokens_by_update += [work] * updates_in_phase(manifest["rows"], phase, train.batch_size)
    return tokens_by_update
