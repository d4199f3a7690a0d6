"""Prepare, paper Algorithm 1 lines 1 to 7, on Ray Data: rows -> templates at each rate -> neighbours -> one dataset for each phase.

Each step is an artefact in the run directory, written once and skipped when it was made from the same fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pi_ray.cluster import placement, storage_sync
from pi_ray.compress.rate_control import CompressedTemplate
from pi_ray.compress.template import cached_template, compress_template, load_compressors
from pi_ray.config import RunConfig
from pi_ray.data import phase_dataset, row_documents
from pi_ray.data.find_neighbours import find_neighbours, has_neighbours
from pi_ray.data.ingest import ingest
from pi_ray.data.ray_map import fan_out
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder, Template
from pi_ray.protocols import SPLITS, UNLABELLED, Task
from pi_ray.run.artifact import is_current, staged
from pi_ray.run.directory import RunDir, documents_file
from pi_ray.run.fingerprint import prepare_fingerprint, wants_unlabelled
from pi_ray.run.phases import distinct_rates, numbered_phases, rate_name

COMPRESS_THREADS = 4

Progress = Callable[[str], None]


def prepare(config: RunConfig, progress: Progress = print) -> str:
    """Bring the run directory up to date and return the fingerprint of what is in it.

    Raises DataError for rows or a template that cannot be used, ModelError for a tokenizer that cannot.
    """
    from pi_ray.registry import tasks

    task: Task = tasks[config.task.name](config.task)
    fingerprint = prepare_fingerprint(config, task.fingerprint())
    run = RunDir(config.root)
    if _is_done(config, run, fingerprint):
        progress("prepare: nothing to do, the run directory is up to date")
        return fingerprint
    tokenizer = load_tokenizer(config.model)
    encoder = PromptEncoder(tokenizer, config.prompt)
    template = task.template()
    if not is_current(run.rows, fingerprint):
        ingest(task, config.task, run, fingerprint, progress, _splits(config))
    if not is_current(run.templates, fingerprint):
        _templates(config, template, tokenizer, run, fingerprint, progress)
    if not _has_documents(config, run, fingerprint):
        row_documents.compress_documents(config, run, fingerprint, _documents(config), progress)
    if not has_neighbours(config, run, fingerprint):
        find_neighbours(config, run, fingerprint, _splits(config), progress)
    _phases(config, encoder, run, fingerprint, progress)
    return fingerprint


def _is_done(config: RunConfig, run: RunDir, fingerprint: str) -> bool:
    folders = [run.rows, run.templates, *(run.phase(name) for name, *_ in _plan(config))]
    return all(is_current(f, fingerprint) for f in folders) and _has_documents(config, run, fingerprint) and has_neighbours(config, run, fingerprint)


def _has_documents(config: RunConfig, run: RunDir, fingerprint: str) -> bool:
    """Whether rows' own documents are there, those of dev rows at each phase's rate too where early stop has come to want them."""
    whole = not is_current(run.documents, fingerprint) or all((run.documents / documents_file(*want)).exists() for want in _documents(config))
    return whole and row_documents.is_done(run, fingerprint)


def _plan(config: RunConfig) -> list[tuple[str, str, float, int]]:
    """(folder, split, rate, shots) of every dataset: one a phase, its unlabelled queries where a teacher answers them, dev with the last phase's prompt, and with early stop with each."""
    phases = [(str(i), "train", p.rate, p.shots) for i, p in numbered_phases(config)]
    unlabelled = [(f"{UNLABELLED}-{i}", UNLABELLED, p.rate, p.shots) for i, p in numbered_phases(config)] if wants_unlabelled(config) else []
    early = [(f"dev-{i}", "dev", p.rate, p.shots) for i, p in numbered_phases(config)] if config.train.early_stop else []
    return [*phases, *unlabelled, ("dev", "dev", *phases[-1][2:]), *early]


def _documents(config: RunConfig) -> list[tuple[str, float]]:
    """(split, template rate) of which the rows' own documents are needed compressed: what each dataset has, and the test rows at inference."""
    plan = _plan(config)
    return [(split, rate) for split, rate in [*((split, rate) for _, split, rate, _ in plan), ("test", plan[-1][2])] if 0 < rate < 1]


def _splits(config: RunConfig) -> tuple[str, ...]:
    return (*SPLITS, UNLABELLED) if wants_unlabelled(config) else SPLITS


# Templates


class CompressRates:
    """Work of an actor: the compressor's model is loaded once, then the template is compressed to any number of rates."""

    def __init__(self, config: RunConfig, template: Template):
        import torch

        torch.set_num_threads(min(COMPRESS_THREADS, os.cpu_count() or 1))  # Ray leaves an actor one; nothing else runs in this step
        self.config = config.compress
        self.template = template
        self.tokenizer = load_tokenizer(config.model)
        self.compressor, self.documents = load_compressors(config.compress)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return asdict(compress_template(self.compressor, self.template, item["rate"], self.tokenizer, self.config, self.documents))


def _templates(config: RunConfig, template: Template, tokenizer: Any, run: RunDir, fingerprint: str, progress: Progress) -> None:
    """Compress the template once for each rate of the schedule; rates that were made before need no actor."""
    made = {rate: cached_template(template, rate, tokenizer, config.compress) for rate in distinct_rates(config)}
    missing = [rate for rate, found in made.items() if found is None]
    results = fan_out([{"rate": rate} for rate in missing], CompressRates, config, template, actors=1, mirror=storage_sync.sync_for(run.root), **placement.worker_options(config, "prepare"))
    made.update((rate, CompressedTemplate(**result)) for rate, result in zip(missing, results, strict=True))
    entries = []
    with staged(run.templates, fingerprint=fingerprint) as folder:
        for rate, result in made.items():
            file = f"rate-{rate_name(rate)}.txt"
            entries.append({"rate": rate, "compressor": config.compress.label, "file": file, **asdict(result)})
            (folder / file).write_text(result.text + "\n", encoding="utf-8")
            note = f"; {result.note}" if result.note else ""
            progress(f"templates: rate {rate:g} -> achieved {result.achieved:.2f} ({result.tokens} of {result.full_tokens} tokens){note}")
        (folder / "templates.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# Phases


def _phases(config: RunConfig, encoder: PromptEncoder, run: RunDir, fingerprint: str, progress: Progress) -> None:
    """One Ray Data job over the unfinished shards of all phases, then each phase is sealed."""
    texts = {e["rate"]: e["text"] for e in json.loads((run.templates / "templates.json").read_bytes())}
    rows = {split: run.rows_of(split) for split in _splits(config) if split != "test"}
    plan = [p for p in _plan(config) if not is_current(run.phase(p[0]), fingerprint)]
    phase_dataset.remove_stale(run.phases, {name for name, *_ in _plan(config)}, fingerprint)
    folders = {name: phase_dataset.working_folder(run.phase(name), fingerprint) for name, *_ in plan}
    planned = [s for name, split, rate, shots in plan for s in phase_dataset.plan(folders[name], split, shots, len(rows[split]), rate)]
    todo = [s for s in planned if not phase_dataset.is_finished(s, rows[s.split])]
    if len(todo) < len(planned):
        progress(f"phases: {len(planned) - len(todo)} of {len(planned)} shards were already there")
    fan_out([asdict(s) for s in todo], phase_dataset.Builder, config, fingerprint, mirror=storage_sync.sync_for(run.root), **placement.worker_options(config, "prepare"))
    for name, _, rate, shots in plan:
        text = texts.get(rate, "")
        made = phase_dataset.publish(
            folders[name], run.phase(name), encoder.prefix(text), fingerprint=fingerprint, template=text, phase={"rate": rate, "shots": shots},
        )
        tokens = made["tokens"]
        progress(f"phase {name}: rate {rate:g}, {shots} shots, {made['rows']} rows, {tokens['prefix']} + {tokens['row_mean']:.0f} tokens a row")
