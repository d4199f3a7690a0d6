"""The retrieval step: neighbours.parquet, the examples of every row, found by Ray Data actors in pieces that survive a kill.

Beside it stands neighbours.json: its hash, how it was made, and on a sample of rows what FAISS missed of the exact best.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pi_ray.cluster import placement, storage_sync
from pi_ray.config import RetrieveConfig, RunConfig
from pi_ray.data.phase_dataset import working_folder
from pi_ray.data.ray_map import fan_out
from pi_ray.run.artifact import digest_file, tell_of, write_atomic, writing
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import most_shots
from pi_ray.run.row_store import count, has_piece, join, read_range, write_piece

PIECE_ROWS = 512  # rows of one neighbour search
SAMPLE = 256  # rows whose exact best are looked up where FAISS chose
SCHEMA = pa.schema({"id": pa.string(), "split": pa.string(), "neighbours": pa.list_(pa.string()), "scores": pa.list_(pa.float32())})
SCORES = {"bleu": "BLEU", "rouge-l": "ROUGE-L", "embedding": "cosine"}


@dataclass(frozen=True)
class Piece:
    """The neighbours of rows [begin, end) of `split`, to be written to `path`."""

    split: str
    begin: int
    end: int
    path: str


class FindNeighbours:
    """Work of an actor: indexes the training rows by the side that is asked for, then any number of pieces. It holds one at a time."""

    def __init__(self, config: RunConfig, k: int):
        self.run, self.config, self.k = RunDir(config.root), config.retrieve, k
        self.by, self.bank = "", None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return self.audit() if "audit" in item else self.find(Piece(**item))

    def find(self, piece: Piece) -> dict[str, Any]:
        rows = self.run.rows_of(piece.split)[piece.begin : piece.end]
        found = self._bank(self.config.by if piece.split == "train" else "query").find(rows, self.k)
        columns = {"id": [r.id for r in rows], "split": [piece.split] * len(rows), "neighbours": [f.ids for f in found], "scores": [f.scores for f in found]}
        write_piece(piece.path, pa.table(columns, schema=SCHEMA))
        return {}

    def audit(self) -> dict[str, Any]:
        from pi_ray.retrieve.neighbours import audit

        rows = self.run.rows_of("train")
        step = max(1, len(rows) // SAMPLE)
        return asdict(audit(self._bank(self.config.by), [r for i, r in enumerate(rows) if i % step == 0][:SAMPLE], self.k))

    def _bank(self, by: str) -> Any:
        from pi_ray.retrieve.neighbours import Bank, part

        if by != self.by:
            self.by, self.bank = "", None  # gone before the next is built: each holds all training rows
            rows = self.run.rows_of("train")
            chosen = part(rows.ids(), self.config.bank_fraction)
            self.by, self.bank = by, Bank((r for r in rows if r.id in chosen), self.config, by)
        return self.bank


def has_neighbours(config: RunConfig, run: RunDir, fingerprint: str) -> bool:
    """Whether neighbours.parquet is there and undamaged; its hash stands beside it. True too when the run needs none."""
    if not most_shots(config):
        return True
    facts = read_facts(run)
    try:
        return facts.get("fingerprint") == fingerprint and facts["sha256"] == digest_file(run.neighbours)
    except (OSError, KeyError):
        return False


def read_facts(run: RunDir) -> dict[str, Any]:
    """neighbours.json; empty where it is missing or damaged."""
    try:
        facts = json.loads(run.neighbours.with_suffix(".json").read_bytes())
        return facts if isinstance(facts, dict) else {}
    except (OSError, ValueError):
        return {}


def find_neighbours(config: RunConfig, run: RunDir, fingerprint: str, splits: Sequence[str], progress: Callable[[str], None]) -> None:
    """Find the examples of all rows and write neighbours.parquet, in the order of the splits and their rows."""
    k = most_shots(config)
    folder = working_folder(run.neighbours, fingerprint)
    for left in run.root.glob(f".{run.neighbours.name}-*.partial"):
        if left != folder:
            shutil.rmtree(left, ignore_errors=True)  # of another configuration
    pieces = list(_plan(run, splits, folder))
    todo = [p for p in pieces if not has_piece(p.path, SCHEMA, run.rows_of(p.split).ids(p.begin, p.end))]
    if len(todo) < len(pieces):
        progress(f"neighbours: {len(pieces) - len(todo)} of {len(pieces)} pieces were already there")
    exact = is_exact(config.retrieve, run)
    items: list[dict[str, Any]] = [*([] if exact else [{"audit": True}]), *map(asdict, todo)]  # all of one index, then all of the other
    results = fan_out(items, FindNeighbours, config, k, actors=-(-len(items) // 4), mirror=storage_sync.of(run.root), **placement.options(config, "prepare"))
    made = folder / "all.parquet"
    with writing(made):
        join([p.path for p in pieces], made, SCHEMA)
        os.replace(made, run.neighbours)
    tell_of(run.neighbours)
    facts = {
        "fingerprint": fingerprint, "sha256": digest_file(run.neighbours), "rows": count(run.neighbours), "shots": k, "score": config.retrieve.score,
        "by": config.retrieve.by, "train_score": _mean_score(run), "method": "exact" if exact else "faiss", **({} if exact else {"audit": results[0]}),
    }
    write_atomic(run.neighbours.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    progress(f"neighbours: {summary(facts)}")


def summary(facts: dict[str, Any], by: str = "answer") -> str:
    """neighbours.json in words. `by`: what training rows were compared by, where an earlier version did not write it down."""
    score, by = SCORES[facts["score"]], facts.get("by", by)
    start = f"{facts['shots']} for each of {facts['rows']} rows, mean {score} {facts['train_score']:.1f} between train {'answers' if by == 'answer' else 'queries'}"
    if facts["method"] == "exact":
        return f"{start}; every pair was scored"
    seen = facts["audit"]
    return (
        f"{start}; FAISS proposed: of {seen['rows']} rows whose every pair was scored it gave {seen['recall']:.1%} of the best, "
        f"mean {score} {seen['score']:.2f} where {seen['exact_score']:.2f} was there"
    )


def is_exact(config: RetrieveConfig, run: RunDir) -> bool:
    from pi_ray.retrieve.neighbours import is_exact as decide

    return decide(config, max(1, round(count(run.rows / "train.parquet") * config.bank_fraction)))


def _plan(run: RunDir, splits: Sequence[str], folder: Path) -> list[Piece]:
    ranges = [(s, a, min(a + PIECE_ROWS, rows)) for s in splits for rows in [count(run.rows / f"{s}.parquet")] for a in range(0, rows, PIECE_ROWS)]
    return [Piece(*range_, str(folder / f"part-{i:05d}.parquet")) for i, range_ in enumerate(ranges)]


def _mean_score(run: RunDir) -> float:
    table = read_range(run.neighbours, columns=["split", "scores"])
    mean = pc.mean(pc.list_flatten(table.filter(pc.equal(table["split"], "train"))["scores"])).as_py()
    return round(mean or 0.0, 4)
