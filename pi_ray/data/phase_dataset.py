"""The datasets of phases: token ids of every row, in Parquet files of 512 rows, sealed with hashes and a prefix.

One pass over a split makes the files of all its phases, so that a row is read and its answer tokenised once.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.data.pieces import RowRange
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import commit_folder, seal_folder
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import read_range, to_rows, write_piece

PIECE_ROWS = 512
SCHEMA = pa.schema({
    "id": pa.string(), "prompt_ids": pa.list_(pa.int32()), "label_ids": pa.list_(pa.int32()),
    "left_out": pa.int32(),  # examples, where all of them would not fit into prompt.context
})


class PhaseData(NamedTuple):
    """One dataset: its folder's name, the split, the template's rate and the examples of each row."""

    name: str
    split: str
    rate: float
    shots: int


class TokeniseRows:
    """Inside a Ray worker: a range of rows -> for each dataset of its split a table of `SCHEMA`.

    prompt_ids are the row's documents, examples, query and chat tail; label_ids the answer and the end of sequence, or
    nothing for an unlabelled query. Where all turns of a conversation are learned, label_ids go from the first
    assistant's turn to the last one, and an id below 0 is the complement of one that is fed and not learned. The
    template is in the manifest. Documents and examples are read from the run directory. Raises DataError for a row that
    is longer than prompt.context without any example.
    """

    def __init__(self, config: RunConfig, fingerprint: str, datasets: list[PhaseData]):
        self.config, self.fingerprint, self.datasets = config, fingerprint, datasets

    def __call__(self, table: pa.Table, rows: RowRange) -> dict[str, pa.Table]:
        encoder, plain = _encoder(self.config.model, self.config.prompt), to_rows(table)
        has_documents = any(r.documents for r in plain)
        # phases whose rows have the same prompts share them
        prompts: dict[tuple[float, ...], tuple[pa.Array, pa.Array]] = {}
        if self.config.learns_all_turns(rows.split):
            turns = [encoder.all_turns(r.query, r.answer) for r in plain]
            prompts[0.0, 0, 0.0] = _ids([prompt for prompt, _ in turns]), pa.array([0] * len(turns), pa.int32())
            learned = [label for _, label in turns]
        else:
            learned = [encoder.answer(r.answer) if r.answer else [] for r in plain]
        labels = _ids(learned)
        tables = {}
        for data in self.datasets:
            if data.split != rows.split:
                continue
            limited = self.config.prompt.context and not self.config.prompt.conversation
            key = (data.rate if has_documents else 0.0, data.shots, data.rate if limited else 0.0)
            if key not in prompts:
                prompts[key] = self._prompts(encoder, plain, data, rows, learned if limited else [])
            ids, left_out = prompts[key]
            tables[data.name] = pa.table([table["id"], ids, labels, left_out], schema=SCHEMA)
        return tables

    def _prompts(
        self, encoder: PromptEncoder, plain: list[Row], data: PhaseData, rows: RowRange, learned: list[list[int]]
    ) -> tuple[pa.Array, pa.Array]:
        """(prompt_ids, left_out); with labels `learned` as prompt.context allows."""
        run = RunDir(self.config.run_dir)
        bank = _bank(self.config.run_dir, self.fingerprint) if data.shots else {}
        shots = run.read_shots(data.split, bank, data.shots, rows.begin, rows.end)
        if data.rate < 1 and any(r.documents for r in plain):
            plain = run.read_rows(data.split, data.rate, rows.begin, rows.end)
        if not learned:
            ids = [encoder.row(r.query, shots.get(r.id, ()), r.documents) for r in plain]
            return _ids(ids), pa.array([0] * len(plain), pa.int32())
        room = self.config.prompt.context - len(encoder.prefix(run.read_templates()[data.rate]))
        found = []
        for row, label in zip(plain, learned, strict=True):
            found.append(encoder.fitted_row(row.query, shots.get(row.id, ()), row.documents, room - len(label)))
            if (more := len(found[-1][0]) + len(label) - room) > 0:
                raise DataError(
                    f"row {row.id} of {data.split} is {more} tokens longer than prompt.context "
                    f"({self.config.prompt.context}) allows behind the template, without any example; shorten it, or "
                    "raise prompt.context"
                )
        return _ids([ids for ids, _ in found]), pa.array([left_out for _, left_out in found], pa.int32())


def _ids(rows: list[list[int]]) -> pa.Array:
    return pa.array(rows, SCHEMA.field("prompt_ids").type)


def publish_phase(
    folder: Path, final: Path, prefix_ids: list[int], context: int | None = None, **manifest: Any
) -> dict[str, Any]:
    """Count tokens, write the manifest, and give the working folder its final name. Returns the manifest.

    A split without rows, such as queries of which there are none, becomes one file without rows. Raises DataError where
    a row with the template is longer than the model's `context`.
    """
    for left in folder.glob(".*.tmp"):
        left.unlink()  # a worker was killed while it wrote
    if not any(folder.glob("part-*.parquet")):
        write_piece(folder / "part-00000.parquet", SCHEMA.empty_table())
    lengths = zip(*(_lengths(path) for path in sorted(folder.glob("part-*.parquet"))), strict=True)
    fed, learned, before, longest = map(np.concatenate, lengths)
    longest_row = int((before + longest).max(initial=0))
    if context and len(prefix_ids) + longest_row > context:
        raise DataError(
            f"phase {final.name}: the template has {len(prefix_ids):,} tokens and the longest row with its answer "
            f"{longest_row:,}, and model.base reads {context:,} in all; shorten them, take fewer examples "
            "(schedule.shots), set prompt.context, which leaves out examples of long rows, or take a model.base with a "
            "longer context"
        )
    tokens = {
        "prefix": len(prefix_ids),
        "row_mean": _rounded_mean(fed), "row_max": int(before.max(initial=0)),
        "label_mean": _rounded_mean(learned), "label_max": int(longest.max(initial=0)),
    }
    cut = sum(_rows_cut(path) for path in folder.glob("part-*.parquet"))
    if cut:
        manifest["cut_rows"] = cut  # that left out examples
    body = seal_folder(folder, prefix_ids=prefix_ids, rows=len(fed), tokens=tokens, **manifest)
    commit_folder(folder, final)
    return body


class Lengths(NamedTuple):
    """Four numbers of tokens for each row: fed and not learned; learned; before its longest answer; of that answer.

    For a row with one answer the last two are the first two.
    """

    fed: np.ndarray
    learned: np.ndarray
    before: np.ndarray
    longest: np.ndarray


def _lengths(path: Path) -> Lengths:
    table = pq.read_table(path, columns=["prompt_ids", "label_ids"]).combine_chunks()
    prompts, labels = (pc.list_value_length(table[name]).to_numpy() for name in ("prompt_ids", "label_ids"))
    if (pc.min(pc.list_flatten(table["label_ids"])).as_py() or 0) >= 0:
        return Lengths(prompts, labels, prompts, labels)
    runs = [_learned_runs(ids) for ids in table["label_ids"].to_pylist()]
    learned, longest = np.array([sum(lengths) for lengths in runs]), np.array([max(lengths) for lengths in runs])
    return Lengths(prompts + labels - learned, learned, prompts + labels - longest, longest)


def _rows_cut(path: Path) -> int:
    return pc.sum(pc.greater(pq.read_table(path, columns=["left_out"])["left_out"], 0)).as_py() or 0


def _learned_runs(label: list[int]) -> list[int]:
    """The lengths of the answers in a label, an end of sequence included."""
    return [len(list(run)) for is_learned, run in groupby(label, lambda i: i >= 0) if is_learned]


def _rounded_mean(lengths: np.ndarray) -> float:
    return round(float(lengths.mean()), 1) if len(lengths) else 0


def remove_stale(phases: Path, keep: set[str], fingerprint: str) -> None:
    """Remove what a longer schedule, another configuration or a killed run left under phases/."""
    for folder in phases.glob("*"):
        extra = re.fullmatch(rf"({UNLABELLED}-|dev-)?\d+", folder.name) and folder.name not in keep
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


# A worker process takes many ranges; the fingerprint in the key keeps a later run in it from an earlier run's rows.
@lru_cache(maxsize=1)
def _bank(run_dir: str, fingerprint: str) -> _Bank:
    return _Bank(RunDir(run_dir).rows / "train.parquet")


@lru_cache(maxsize=2)
def _encoder(model: ModelConfig, prompt: PromptConfig) -> PromptEncoder:
    return PromptEncoder(load_tokenizer(model), prompt)
