"""Shards: the token ids of one phase's rows, in parquet files of 256 rows, each a pure function of (row range, config).

Workers write shards into a hidden folder whose name holds the fingerprint; the driver seals and renames it when all are there.
After a kill the finished shards are found again, so that nothing is done twice, and the result is byte-identical.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pi_ray.artifact import commit, seal, write_atomic
from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.rundir import RunDir

SHARD_ROWS = 256
SCHEMA = pa.schema({"id": pa.string(), "prompt_ids": pa.list_(pa.int32()), "label_ids": pa.list_(pa.int32())})


@dataclass(frozen=True)
class Shard:
    """Rows [begin, end) of `split` with `shots` examples each, to be written to `path`."""

    split: str
    shots: int
    begin: int
    end: int
    path: str


def plan(folder: Path, split: str, shots: int, rows: int) -> list[Shard]:
    starts = range(0, rows, SHARD_ROWS)
    return [Shard(split, shots, a, min(a + SHARD_ROWS, rows), str(folder / f"part-{i:05d}.parquet")) for i, a in enumerate(starts)]


def working_folder(final: Path, fingerprint: str) -> Path:
    """Where shards of `final` gather until it is complete."""
    folder = final.with_name(f".{final.name}-{fingerprint[:12]}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_finished(shard: Shard, rows: Sequence[Row]) -> bool:
    """True when the file is there, undamaged, and holds these rows (all rows of the split are given)."""
    try:
        table = pq.read_table(shard.path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return table.schema.equals(SCHEMA) and table["id"].to_pylist() == [r.id for r in rows[shard.begin : shard.end]]


class Builder:
    """Work of a Ray worker: encodes a shard's rows and writes its file in one step. Reads rows and neighbours of the run directory."""

    def __init__(self, config: RunConfig, fingerprint: str):
        self.config, self.fingerprint = config, fingerprint

    def __call__(self, item: dict[str, Any]) -> str:
        shard, run_dir = Shard(**item), self.config.run_dir
        rows = _rows(run_dir, shard.split, self.fingerprint)[shard.begin : shard.end]
        shots = _shots(run_dir, shard.split, shard.shots, self.fingerprint)
        table = encode(rows, shots, _encoder(self.config.model, self.config.prompt))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        write_atomic(Path(shard.path), buffer.getvalue())
        return shard.path


def encode(rows: Sequence[Row], shots: dict[str, list[Example]], encoder: PromptEncoder) -> pa.Table:
    """Columns id, prompt_ids (examples, query, chat tail) and label_ids (answer, end of sequence; empty for an unlabelled query).

    The template is in the manifest.
    """
    prompts = [encoder.row(r.query, shots.get(r.id, ())) for r in rows]
    labels = [encoder.answer(r.answer) if r.answer else [] for r in rows]
    return pa.table({"id": [r.id for r in rows], "prompt_ids": prompts, "label_ids": labels}, schema=SCHEMA)


def publish(folder: Path, final: Path, prefix_ids: list[int], **manifest: Any) -> dict[str, Any]:
    """Count tokens, write the manifest, and give the working folder its final name. Returns the manifest."""
    for left in folder.glob(".*.tmp"):
        left.unlink()  # a worker was killed while it wrote
    table = pa.concat_tables(pq.read_table(p) for p in sorted(folder.glob("part-*.parquet")))
    prompts, labels = pc.list_value_length(table["prompt_ids"]), pc.list_value_length(table["label_ids"])
    tokens = {
        "prefix": len(prefix_ids),
        "row_mean": round(pc.mean(prompts).as_py(), 1), "row_max": pc.max(prompts).as_py(),
        "label_mean": round(pc.mean(labels).as_py(), 1), "label_max": pc.max(labels).as_py(),
    }
    body = seal(folder, prefix_ids=prefix_ids, rows=table.num_rows, tokens=tokens, **manifest)
    commit(folder, final)
    return body


def remove_stale(phases: Path, keep: set[str], fingerprint: str) -> None:
    """Remove what a longer schedule, another configuration or a killed run left under phases/."""
    for folder in phases.glob("*"):
        extra = re.fullmatch(rf"({UNLABELLED}-)?\d+", folder.name) and folder.name not in keep
        other = folder.suffix == ".partial" and not folder.name.endswith(f"-{fingerprint[:12]}.partial")
        if extra or other or re.fullmatch(r"\.\w+\.[0-9a-f]{32}\.(tmp|old)", folder.name):
            shutil.rmtree(folder, ignore_errors=True)


# Worker processes build many shards; the fingerprint in the key keeps a later run in the same process from reading an earlier one's rows.
@lru_cache(maxsize=4)
def _rows(run_dir: str, split: str, fingerprint: str) -> list[Row]:
    return RunDir(run_dir).read_rows(split)


@lru_cache(maxsize=4)
def _shots(run_dir: str, split: str, k: int, fingerprint: str) -> dict[str, list[Example]]:
    bank = {r.id: r for r in _rows(run_dir, "train", fingerprint)} if k else {}
    return RunDir(run_dir).read_shots(split, bank, k)


@lru_cache(maxsize=2)
def _encoder(model: ModelConfig, prompt: PromptConfig) -> PromptEncoder:
    return PromptEncoder(load_tokenizer(model), prompt)
