"""A teacher that answers outside training: in actors with whole weights, while the training workers are gone.

Where ZeRO stage 3 shards the base model, no training worker can generate. Training then ends with a checkpoint before
the first update that learns from the teacher; these actors load base and adapter as evaluation does; training goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import RunConfig
from pi_ray.data.ray_map import stream
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import MANIFEST_HASH, digest, is_current, read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.result_log import ResultLog
from pi_ray.train.distill import Teacher, longest_row_tokens, write_answers
from pi_ray.train.distilled_rows import SCHEMA
from pi_ray.train.lora import load_adapter
from pi_ray.train.lora_linear import fuse_lora
from pi_ray.train.packing import choose_packing
from pi_ray.train.replicas import generation_workers, load_for_generation
from pi_ray.train.shared_prefix import why_prefix_cannot_be_shared
from pi_ray.train.teacher_rows import open_teacher_rows
from pi_ray.train.vllm_batches import choose_engine
from pi_ray.train.vllm_teacher import VllmTeacher

log = logging.getLogger("pi_ray")
PART_ROWS = 256  # rows of one call: after each it is said how far the teacher is


def is_due(config: RunConfig, fingerprint: str) -> bool:
    """Whether actors have to answer now: the teacher is there, and its answers are not."""
    run = RunDir(config.root)
    if not (config.train.actors_answer and wants_unlabelled(config)) or is_current(run.teacher_answers, fingerprint):
        return False
    folder = teacher_folder(config)
    return not folder or folder != run.adapter(0) or is_current(folder, fingerprint)


def teacher_folder(config: RunConfig) -> Path | None:
    """The adapter that teaches: the first phase's, or another run's; None where the base does."""
    distill = config.train.distill
    if distill.teacher == "base":
        return None
    return Path(distill.teacher_adapter) if distill.teacher_adapter else RunDir(config.root).adapter(0)


def answer_in_actors(
    config: RunConfig, fingerprint: str, step: int, watch: Callable[[dict[str, Any]], None]
) -> None:
    """Write the teacher's answers, the same artifact that training workers write, before update `step`.

    `watch` gets entries as a training log has them. Parts are kept as they come: after a kill only the others are
    answered.
    """
    run, sync = RunDir(config.root), storage_sync.sync_for(config.root)
    session.connect()
    counts = {"labels": len(open_teacher_rows(config, "train")), "queries": len(open_teacher_rows(config, UNLABELLED))}
    parts: list[dict[str, Any]] = [
        {"kind": kind, "begin": begin, "end": min(begin + PART_ROWS, count)}
        for kind, count in counts.items() for begin in range(0, count, PART_ROWS)
    ]
    parts += [{"kind": "anchor", "begin": 0, "end": 0}] if config.train.distill.anchor else []
    folder = teacher_folder(config)
    engine = choose_engine(config, [str(folder)] if folder else [])
    settings = [fingerprint, (read_manifest(folder) or {}).get(MANIFEST_HASH, "") if folder else "", engine]
    keys = [digest([settings, part]) for part in parts]

    def tell() -> None:
        answered = (p for p, key in zip(parts, keys, strict=True) if p["kind"] == "queries" and key in kept)
        done = sum(part["end"] - part["begin"] for part in answered)
        watch({"event": "teacher", "step": step, "verb": "answered", "done": done, "total": counts["queries"]})

    with ResultLog(run.teaching_log, notify_every=1) as kept:
        todo = [place for place, key in enumerate(keys) if key not in kept]
        if len(todo) < len(parts):
            tell()
        last = time.monotonic()
        for i, rows in _answer_parts(config, engine, str(folder or ""), [parts[place] for place in todo]):
            now = time.monotonic()
            kept.add(keys[todo[i]], {"rows": rows, "seconds": now - last})
            last = now
            if parts[todo[i]]["kind"] == "queries":
                tell()
    tables, seconds = [], 0.0
    for key in keys:
        result = kept[key]
        tables.append(pa.Table.from_pylist(result["rows"], SCHEMA))
        seconds += result["seconds"]
    anchor = tables.pop() if config.train.distill.anchor else None
    write_answers(config, fingerprint, pa.concat_tables([SCHEMA.empty_table(), *tables]), anchor, seconds)
    run.teaching_log.unlink(missing_ok=True)
    if sync:
        sync.push_changes()


def _answer_parts(
    config: RunConfig, engine: str, folder: str, parts: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (place in `parts`, rows of SCHEMA as JSON values)."""
    nodes = placement.cluster_nodes()
    if engine == "vllm":
        return VllmTeacher(config, folder, nodes).answer_parts(parts)
    actors, options = generation_workers(config, nodes)
    sync = storage_sync.sync_for(config.root)
    return stream(parts, TeacherWorker, config.model_dump(mode="json"), folder, actors=actors, sync=sync, **options)


class TeacherWorker:
    """A Ray Data actor: base and adapter, which answer and judge part after part of the rows."""

    def __init__(self, config: dict[str, Any], folder: str):
        self.config = RunConfig.model_validate(config)
        base = load_for_generation(self.config.model).requires_grad_(False)
        spread = len(set(getattr(base, "hf_device_map", {}).values())) > 1
        reason = "it lies on several GPUs" if spread else why_prefix_cannot_be_shared(base)
        model = load_adapter(base, folder) if folder else base
        fuse_lora(model)
        longest, device = longest_row_tokens(self.config), str(base.device)
        pack, why_not_packed = choose_packing(model, self.config.train, device, longest, reason)
        if why_not_packed:
            log.info("the teacher reads rows one by one with the prompt: %s", why_not_packed["reason"])
        self.teacher = Teacher(model, self.config, pack)

    def __call__(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of SCHEMA as JSON values."""
        numbers = range(part["begin"], part["end"])
        if part["kind"] == "anchor":
            return self.teacher.judge_anchor().to_pylist()
        if part["kind"] == "labels":
            return list(self.teacher.judge_labels(numbers, _tell_nobody))
        return list(self.teacher.answer(numbers, _tell_nobody))


def _tell_nobody(verb: str, done: int, total: int) -> None:
    """The driver counts parts instead."""
