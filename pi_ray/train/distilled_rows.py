"""Distilled rows: the rows that students learn from, with the teacher's distribution at each token of their answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pi_ray.config import DistillConfig, TrainConfig
from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import read_range
from pi_ray.train.anchor import AnchorRows
from pi_ray.train.batches import PhaseDataset, TokenRow
from pi_ray.train.updates import Round, RowKinds

SCHEMA = pa.schema({
    "labelled": pa.bool_(), "number": pa.int32(), "label_ids": pa.list_(pa.int32()), "confidence": pa.float32(),
    "agreement": pa.float32(), "held_out": pa.bool_(), "novel": pa.bool_(),
    "top_ids": pa.list_(pa.int32()), "top_logprobs": pa.list_(pa.float32()),
})  # novel: it may say a fact that no label says; top_*: top_k for each token of label_ids, one after another
FILE, ANCHOR_FILE, ROUND_FILE = "teacher_answers.parquet", "anchor.parquet", "student_answers.parquet"


@dataclass(frozen=True)
class Targets:
    """The teacher's likeliest tokens at N answer tokens: `ids` (N, k) int64, `probs` (N, k) float32.

    `tail` (N,) is the probability of all other tokens together, 0 where `probs` were made to sum to 1; None: all are.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    tail: torch.Tensor | None
    weights: torch.Tensor  # (N,) float32, how much each token counts
    shares: torch.Tensor  # (N,) float32, the teacher's weight at each token; the label has the rest

    def to(self, device: torch.device | str) -> Targets:
        tail = None if self.tail is None else self.tail.to(device)
        moved = (x.to(device) for x in (self.weights, self.shares))
        return Targets(self.ids.to(device), self.probs.to(device), tail, *moved)


def choose_kept(table: pa.Table, config: DistillConfig) -> pa.ChunkedArray:
    """Which rows of SCHEMA are learned from: those with labels, and answers that are sure enough and not held out."""
    sure = pc.greater_equal(table["confidence"], -math.inf if config.confidence is None else config.confidence)
    if config.known_confidence is not None:
        sure = pc.and_(sure, pc.or_(table["novel"], pc.greater_equal(table["confidence"], config.known_confidence)))
    if config.agreement == "filter":
        sure = pc.and_(sure, pc.equal(table["agreement"], 1.0))
    return pc.or_(table["labelled"], pc.and_(sure, pc.invert(table["held_out"])))


class DistilledRows:
    """The rows of a phase after the first: those with labels, then unlabelled ones that the teacher answered surely.

    Anchor rows come last. Each of them counts as much as a row with an answer of mean length, however long its own is.
    """

    def __init__(
        self, folder: Path, labelled: PhaseDataset, unlabelled: PhaseDataset, train: TrainConfig,
        anchor: AnchorRows | None = None,
    ):
        self.top_k, config = verify_artifact(folder)["top_k"], train.distill
        self.prefix = self.anchor_prefix = labelled.prefix
        table = read_range(Path(folder) / FILE)
        kept = table.filter(choose_kept(table, config))
        has_label, size = kept["labelled"].to_numpy(), kept.num_rows
        self.kinds = RowKinds(int(has_label.sum()), size - int(has_label.sum()))
        # row number in this dataset -> (dataset with its prompt, row number there)
        self._prompts: list[tuple[PhaseDataset | AnchorRows, int]] = [
            (labelled if own else unlabelled, number)
            for own, number in zip(has_label, kept["number"].to_pylist(), strict=True)
        ]
        self._answers = kept.select(["label_ids", "top_ids", "top_logprobs"])
        self._has_tail = np.full(size, config.tail)
        agreement = kept["agreement"].to_numpy() if config.agreement == "weight" else np.ones(size)
        self._weights = np.where(has_label, 1, agreement).astype(np.float32)
        self._shares = np.full(size, config.share if train.objective == "mixed" else 1, np.float32)
        if train.objective == "distill":
            self._shares[has_label] = 1 - config.label_weight
        self._places = np.arange(size)  # row number -> its line in _answers
        self.label_lengths = pc.list_value_length(self._answers["label_ids"]).to_numpy()
        self.token_counts = self.label_lengths.astype(float)  # by which the loss of an update is divided
        if anchor:
            self._add_anchor(anchor, read_range(Path(folder) / ANCHOR_FILE))
        self.prompt_lengths = np.array([data.prompt_lengths[n] for data, n in self._prompts])

    def _add_anchor(self, anchor: AnchorRows, judged: pa.Table) -> None:
        size, mean = len(anchor), self.token_counts.mean()
        self.kinds, self.anchor_prefix = replace(self.kinds, anchor=size), anchor.prefix
        self._prompts += [(anchor, number) for number in range(size)]
        self._answers = pa.concat_tables([self._answers, judged.select(self._answers.column_names)])
        self._places = np.arange(len(self._answers))
        self.label_lengths = np.concatenate([self.label_lengths, anchor.label_lengths])
        self.token_counts = np.concatenate([self.token_counts, np.full(size, mean)])
        self._weights = np.concatenate([self._weights, mean / anchor.label_lengths]).astype(np.float32)
        self._shares = np.concatenate([self._shares, np.ones(size, np.float32)])
        self._has_tail = np.concatenate([self._has_tail, np.ones(size, bool)])

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, numbers: Sequence[int]) -> list[TokenRow]:
        prompts = [data.take([n])[0][0] for data, n in (self._prompts[i] for i in numbers)]
        labels = self._answers["label_ids"].take(self._places[list(numbers)])
        return list(zip(prompts, labels.to_pylist(), strict=True))

    def by_prefix(self, numbers: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """(prefix ids, those of these rows that stand behind it): one group, or anchor rows in one of their own."""
        own = self.kinds.labelled + self.kinds.answered
        if self.prefix == self.anchor_prefix:
            return [(self.prefix, list(numbers))]
        groups = (self.prefix, [n for n in numbers if n < own]), (self.anchor_prefix, [n for n in numbers if n >= own])
        return [group for group in groups if group[1]]

    def number_in_phase(self, number: int) -> int:
        """The row's number among its phase's labelled rows or unlabelled queries, whichever it is one of."""
        return self._prompts[number][1]

    def with_answers(self, written: pa.Table) -> DistilledRows:
        """These rows with other answers to some of them, in the columns of SCHEMA by `number`.

        Of such an answer the teacher's distribution alone is learned, with its tail: the text is the student's own.
        """
        other, columns = copy.copy(self), self._answers.column_names
        other._answers = pa.concat_tables([self._answers, written.select(columns)])
        other._places = self._places.copy()
        other._has_tail, other._shares = self._has_tail.copy(), self._shares.copy()
        other._weights, numbers = self._weights.copy(), written["number"].to_numpy()
        other._places[numbers], other._has_tail[numbers] = len(self._answers) + np.arange(len(written)), True
        other._shares[numbers] = other._weights[numbers] = 1
        other.label_lengths = pc.list_value_length(other._answers["label_ids"]).to_numpy()[other._places]
        other.token_counts = self.token_counts.copy()
        other.token_counts[numbers] = other.label_lengths[numbers]
        return other

    def targets(self, numbers: list[int]) -> Targets:
        """The teacher's tokens at every answer token of these rows, in their order."""
        places = self._places[numbers].tolist()
        ids, logprobs = (
            np.concatenate([self._answers[name][n].values.to_numpy() for n in places]).reshape(-1, self.top_k)
            for name in ("top_ids", "top_logprobs")
        )
        weights, shares, has_tail = (
            torch.from_numpy(np.repeat(column[numbers], self.label_lengths[numbers]))
            for column in (self._weights, self._shares, self._has_tail)
        )
        found, tail = torch.from_numpy(logprobs), None
        probs = torch.softmax(found, -1)
        if has_tail.any():
            probs = torch.where(has_tail[:, None], found.exp(), probs)
            tail = torch.where(has_tail, 1 - probs.sum(-1), 0).clamp(min=0)
        return Targets(torch.from_numpy(ids.astype(np.int64)), probs, tail, weights, shares)


def round_folder(run: RunDir, asked: Round) -> Path:
    return run.student_answers / f"round-{asked.number:04d}"


def read_round(run: RunDir, asked: Round) -> pa.Table:
    """The student's answers of a round, in the columns of SCHEMA; `number` is the row's own in its DistilledRows."""
    verify_artifact(round_folder(run, asked))
    return read_range(round_folder(run, asked) / ROUND_FILE)
