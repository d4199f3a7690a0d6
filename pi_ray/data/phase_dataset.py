"""Shards: the token ids of one phase's rows, in parquet files of 256 rows, each a pure function of (row range, config).

Workers write shards into a hidden folder whose name holds the fingerprint; the driver seals and renames it when all are there.
After a kill the finished shards are found again, so that nothing is done twice, and the result is byte-identical.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import commit, seal
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import StoredRows, has_piece, read_range, write_piece

SHARD_ROWS = 256
SCHEMA = pa.schema({"id": pa.string(), "prompt_ids": pa.list_(pa.int32()), "label_ids": pa.list_(pa.int32())})


@dataclass(frozen=True)
class Shard:
    """Rows [begin, end) of `split` with `shots` examples each and their documents at `rate`, to be written to `path`."""

    split: str
    shots: int
    begin: int
    end: int
    path: str
    rate: float = 0.0


def plan(folder: Path, split: str, shots: int, rows: int, rate: float) -> list[Shard]:
    starts = range(0, rows, SHARD_ROWS)
    return [Shard(split, shots, a, min(a + SHARD_ROWS, rows), str(folder / f"part-{i:05d}.parquet"), rate) for i, a in enumerate(starts)]


def working_folder(final: Path, fingerprint: str) -> Path:
    """Where shards of `final` gather until it is complete."""
    folder = final.with_name(f".{final.name}-{fingerprint[:12]}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_finished(shard: Shard, rows: Sequence[Row]) -> bool:
    """True when the file is there, undamaged, and holds these rows (all rows of the split are given)."""
    if not Path(shard.path).exists():
        return False
    ids = rows.ids(shard.begin, shard.end) if isinstance(rows, StoredRows) else [r.id for r in rows[shard.begin : shard.end]]
    return has_piece(shard.path, SCHEMA, ids)


class Builder:
    """Work of a Ray worker: encodes a shard's rows and writes its file in one step. Reads its part of the run directory."""

    def __init__(self, config: RunConfig, fingerprint: str):
        self.config, self.fingerprint = config, fingerprint

    def __call__(self, item: dict[str, Any]) -> str:
        shard, run = Shard(**item), RunDir(self.config.run_dir)
        rows = run.read_rows(shard.split, shard.rate, shard.begin, shard.end)
        bank = _bank(self.config.run_dir, self.fingerprint) if shard.shots else {}
        shots = run.read_shots(shard.split, bank, shard.shots, shard.begin, shard.end)
        write_piece(shard.path, encode(rows, shots, _encoder(self.config.model, self.config.prompt)))
        return shard.path


def encode(rows: Sequence[Row], shots: dict[str, list[Example]], encoder: PromptEncoder) -> pa.Table:
    """Columns id, prompt_ids (the row's documents, examples, query, chat tail) and label_ids (answer, end of sequence; empty for an unlabelled query).

    The template is in the manifest.
    """
    prompts = [encoder.row(r.query, shots.get(r.id, ()), r.documents) for r in rows]
    labels = [encoder.answer(r.answer) if r.answer else [] for r in rows]
    return pa.table({"id": [r.id for r in rows], "prompt_ids": prompts, "label_ids": labels}, schema=SCHEMA)


def publish(folder: Path, final: Path, prefix_ids: list[int], **manifest: Any) -> dict[str, Any]:
    """Count tokens, write the manifest, and give the working folder its final name. Returns the manifest."""
    for left in folder.glob(".*.tmp"):
        left.unlink()  # a worker was killed while it wrote
    lengths = [_lengths(path) for path in sorted(folder.glob("part-*.parquet"))]
    prompts, labels = (pa.chunked_array([part[i] for part in lengths]) for i in (0, 1))
    tokens = {
        "prefix": len(prefix_ids),
        "row_mean": round(pc.mean(prompts).as_py(), 1), "row_max": pc.max(prompts).as_py(),
        "label_mean": round(pc.mean(labels).as_py(), 1), "label_max": pc.max(labels).as_py(),
    }
    body = seal(folder, prefix_ids=prefix_ids, rows=len(prompts), tokens=tokens, **manifest)
    commit(folder, final)
    return body


def _lengths(path: Path) -> tuple[pa.Array, pa.Array]:
    table = pq.read_table(path, columns=["prompt_ids", "label_ids"]).combine_chunks()
    return tuple(pc.list_value_length(table[name]).combine_chunks() for name in ("prompt_ids", "label_ids"))


def remove_stale(phases: Path, keep: set[str], fingerprint: str) -> None:
    """Remove what a longer schedule, another configuration or a killed run left under phases/."""
    for folder in phases.glob("*"):
        extra = re.fullmatch(rf"({UNLABELLED}-)?\d+", folder.name) and folder.name not in keep
        other = folder.suffix == ".partial" and not folder.name.endswith(f"-{fingerprint[:12]}.partial")
        if extra or other or re.fullmatch(r"\.\w+\.[0-9a-f]{32}\.(tmp|old)", folder.name):
            shutil.rmtree(folder, ignore_errors=True)


class _Bank(Mapping[str, Example]):
    """id -> training row as an example. Texts stay in Arrow's memory, which takes half of what Python objects would."""

    def __init__(self, path: Path):
        table = read_range(path, columns=["id", "query", "answer"])
        self.places = {name: i for i, name in enumerate(table["id"].to_pylist())}
        self.queries, self.answers = table["query"], table["answer"]

    def __getitem__(self, name: str) -> Example:
        place = self.places[name]
        return Example(self.queries[place].as_py(), self.answers[place].as_py())

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


# Worker processes build many shards; the fingerprint in the key keeps a later run in the same process from reading an earlier one's rows.
@lru_cache(maxsize=1)
def _bank(run_dir: str, fingerprint: str) -> _Bank:
    return _Bank(RunDir(run_dir).rows / "train.parquet")


@lru_cache(maxsize=2)
def _encoder(model: ModelConfig, prompt: PromptConfig) -> PromptEncoder:
    return PromptEncoder(load_tokenizer(model), prompt)
