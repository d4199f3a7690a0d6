"""The retrieval step: neighbours.parquet, the examples of every row, found by Ray Data actors that share one bank.

A task builds the bank, and Ray's object store holds it: the actors of a node read its arrays in place. neighbours.json
has the result's hash, how it was made, and what FAISS missed on a sample.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import RetrieveConfig, RunConfig
from pi_ray.data.pieces import Pieces, RowRange, partial_folder, run_pipeline
from pi_ray.data.ray_map import Attach, attach_of, raise_worker_errors
from pi_ray.run.artifact import digest_file, notify_written, translate_disk_errors, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import max_shots
from pi_ray.run.row_store import count_rows, join_pieces, read_range, to_rows

PIECE_ROWS = 512
SAMPLE = 256  # rows whose exact best are looked up where FAISS chose
SCHEMA = pa.schema({
    "id": pa.string(), "split": pa.string(), "neighbours": pa.list_(pa.string()), "scores": pa.list_(pa.float32()),
})
COPY_TRAP = 0.5  # share of rows with an example of their own answer above which a note says what that teaches
SCORES = {"bleu": "BLEU", "rouge-l": "ROUGE-L", "embedding": "cosine"}


class FindNeighbours:
    """Inside an actor: the neighbours of a range of rows in the bank that `get_bank` gives, fetched once."""

    def __init__(self, get_bank: Callable[[], Any], k: int):
        self.bank, self.k = get_bank(), k

    def __call__(self, table: pa.Table, rows: RowRange) -> dict[str, pa.Table]:
        found = self.bank.find(to_rows(table), self.k)
        ids, scores = [f.ids for f in found], [f.scores for f in found]
        columns = {"id": table["id"], "split": [rows.split] * len(found), "neighbours": ids, "scores": scores}
        return {rows.split: pa.table(columns, schema=SCHEMA)}


def build_bank(run: RunDir, config: RetrieveConfig, by: Any, attach: Attach | None = None) -> tuple[None, Any]:
    """Nothing, as a sign that it is done, and the bank of the run's training rows, compared by `by`."""
    from pi_ray.retrieve.neighbours import Bank, choose_bank

    if attach:
        attach()
    rows = run.rows_of("train")
    chosen = choose_bank(rows.ids(), config.bank_fraction)
    return None, Bank((row for row in rows if row.id in chosen), config, by)


def audit_sample(run: RunDir, bank: Any, k: int, attach: Attach | None = None) -> dict[str, Any]:
    """Compare FAISS's choice with the exact best, on training rows in equal steps."""
    from pi_ray.retrieve.neighbours import audit_bank

    if attach:
        attach()
    rows = run.rows_of("train")
    step = max(1, len(rows) // SAMPLE)
    return audit_bank(bank, [row for i, row in enumerate(rows) if i % step == 0][:SAMPLE], k)


def has_neighbours(config: RunConfig, run: RunDir, fingerprint: str) -> bool:
    """Whether neighbours.parquet is there with enough for each row and undamaged (its hash stands beside it), or the
    run needs none.
    """
    if not max_shots(config):
        return True
    facts = read_facts(run)
    try:
        made = facts.get("fingerprint") == fingerprint and facts["shots"] >= max_shots(config)
        return made and facts["sha256"] == digest_file(run.neighbours)
    except (OSError, KeyError, TypeError):
        return False


def read_facts(run: RunDir) -> dict[str, Any]:
    """neighbours.json; empty where it is missing or damaged."""
    try:
        facts = json.loads(run.neighbours.with_suffix(".json").read_bytes())
        return facts if isinstance(facts, dict) else {}
    except (OSError, ValueError):
        return {}


def find_neighbours(
    config: RunConfig, run: RunDir, fingerprint: str, splits: Sequence[str], progress: Callable[[str], None],
) -> None:
    """Find the examples of all rows and write neighbours.parquet, in the order of the splits and their rows."""
    k, exact = max_shots(config), is_exact(config.retrieve, run)
    folder = partial_folder(run.neighbours, f"{k}-{fingerprint}")
    pieces = Pieces(run, SCHEMA, PIECE_ROWS, {split: {split: f"{folder}/{split}-"} for split in splits})
    todo = pieces.unfinished("neighbours", progress)
    audit: dict[str, Any] = {}
    for by in dict.fromkeys((config.retrieve.by, "query")):  # dev and test rows always go by the query
        ranges = [rows for rows in todo if by == (config.retrieve.by if rows.split == "train" else "query")]
        to_audit = not exact and by == config.retrieve.by
        if ranges or to_audit:
            audit |= _search(config, pieces, ranges, by, k, to_audit)
    made = folder / "all.parquet"
    with translate_disk_errors(made):
        join_pieces((file for split in splits for file in pieces.files(split, split)), made, SCHEMA)
        os.replace(made, run.neighbours)
    notify_written(run.neighbours)
    facts = {
        "fingerprint": fingerprint, "sha256": digest_file(run.neighbours), "rows": count_rows(run.neighbours),
        "shots": k, "score": config.retrieve.score, "by": config.retrieve.by, "train_score": _mean_score(run),
        "same_answer": same_answer_share(run),
        "method": "exact" if exact else "faiss", **({} if exact else {"audit": audit}),
    }
    write_atomic(run.neighbours.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    progress(f"neighbours: {summarise_facts(facts)}")


def _search(
    config: RunConfig, pieces: Pieces, ranges: list[RowRange], by: str, k: int, to_audit: bool,
) -> dict[str, Any]:
    """Find the neighbours of these ranges in the bank of one side, and return its audit. Then the bank is freed."""
    session.connect()
    import ray

    attach, options = attach_of(storage_sync.sync_for(pieces.run.root)), placement.worker_options(config, "prepare")
    with raise_worker_errors():
        build = ray.remote(build_bank).options(num_returns=2, **options)
        built, bank = build.remote(pieces.run, config.retrieve, by, attach)
        ray.get(built)  # the driver waits for the bank, and does not fetch it
        audit = ray.remote(audit_sample).options(**options).remote(pieces.run, bank, k, attach) if to_audit else None
        run_pipeline(config, pieces, ranges, FindNeighbours, partial(ray.get, bank), k, actors=-(-len(ranges) // 4))
        return ray.get(audit) if audit else {}


def summarise_facts(facts: dict[str, Any], by: str = "answer") -> str:
    """neighbours.json in words. `by`: the side that training rows were compared by, where the file does not say."""
    score, by = SCORES[facts["score"]], facts.get("by", by)
    between = f"mean {score} {facts['train_score']:.1f} between train {'answers' if by == 'answer' else 'queries'}"
    start = f"{facts['shots']} for each of {facts['rows']} rows, {between}"
    if not facts["train_score"]:
        other = " (as of texts without spaces between words; take retrieve.score=rouge-l)" * (facts["score"] == "bleu")
        start += f"; all scores are 0, so examples were chosen by their ids alone{other}"
    if share := facts.get("same_answer"):
        start += f", {share:.0%} of train rows have an example with their own answer"
    if share and share > COPY_TRAP:
        start += " (copying it teaches nothing of the template: take retrieve.by=query or schedule.shots=0)"
    if facts["method"] == "exact":
        return f"{start}; every pair was scored"
    seen = facts["audit"]
    return (
        f"{start}; FAISS proposed: of {seen['rows']} rows whose every pair was scored it gave {seen['recall']:.1%} of "
        f"the best, mean {score} {seen['score']:.2f} where {seen['exact_score']:.2f} was there"
    )


def is_exact(config: RetrieveConfig, run: RunDir) -> bool:
    """Whether every pair of the run's rows is scored."""
    from pi_ray.retrieve.neighbours import scores_all_pairs

    return scores_all_pairs(config, max(1, round(count_rows(run.rows / "train.parquet") * config.bank_fraction)))


def same_answer_share(run: RunDir) -> float:
    """The share of training rows with an example that has the row's own answer, which gives it away."""
    from pi_ray.retrieve.ngrams import hash_texts

    shots = read_range(run.neighbours, columns=["id", "split", "neighbours"])
    shots = shots.filter(pc.equal(shots["split"], "train")).combine_chunks()
    ids = read_range(run.rows_of("train").path, columns=["id"])["id"]
    hashes = pa.array(hash_texts((row.answer for row in run.rows_of("train")), np.int64))  # 8 bytes a row in memory

    def answers_of(some: Any) -> Any:
        return hashes.take(pc.index_in(some, value_set=ids))

    row_of_example = pc.list_parent_indices(shots["neighbours"])
    same = pc.equal(answers_of(pc.list_flatten(shots["neighbours"])), answers_of(pc.take(shots["id"], row_of_example)))
    return round(pc.count_distinct(row_of_example.filter(same)).as_py() / max(shots.num_rows, 1), 4)


def _mean_score(run: RunDir) -> float:
    table = read_range(run.neighbours, columns=["split", "scores"])
    mean = pc.mean(pc.list_flatten(table.filter(pc.equal(table["split"], "train"))["scores"])).as_py()
    return round(mean or 0.0, 4)
