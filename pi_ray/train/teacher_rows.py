"""Rows as a teacher reads them: behind its own prompt, with whole documents, and its labels where it may see them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc

from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder
from pi_ray.protocols import UNLABELLED
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import first_taught_phase
from pi_ray.run.row_store import read_range, to_rows
from pi_ray.train.batches import PhaseDataset, TokenRow, dataset_manifest


def open_teacher_rows(config: RunConfig, split: str) -> PhaseDataset | TeacherRows:
    """The rows of "train" or UNLABELLED: those of the first phase, unless their prompts differ from the teacher's.

    They differ with `train.distill.show_labels`, and where the first phase has shortened documents.
    """
    run = RunDir(config.root)
    data = PhaseDataset(run.phase(0) if split == "train" else run.phase(f"{UNLABELLED}-0"))
    shows_labels = split == "train" and config.train.distill.show_labels
    if shows_labels or (first_taught_phase(config) == 0 and _have_documents(run, split)):
        return TeacherRows(config, data, split, shows_labels)
    return data


def _have_documents(run: RunDir, split: str) -> bool:
    documents = read_range(run.rows_of(split).path, columns=["documents"])["documents"]
    return bool(pc.sum(pc.list_value_length(documents)).as_py())


class TeacherRows:
    """Rows with all of their documents; with `shows_labels` the last example is the row itself."""

    def __init__(self, config: RunConfig, data: PhaseDataset, split: str, shows_labels: bool):
        run, self.data, self.shows_labels = RunDir(config.root), data, shows_labels
        self.label_lengths = data.label_lengths
        self.encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
        self.rows = read_range(run.rows_of(split).path)
        shots = dataset_manifest(run.phase(0))["phase"]["shots"]
        bank = {row.id: row for row in run.rows_of("train")} if shots else {}
        self.examples = run.read_shots(split, bank, shots)

    def __len__(self) -> int:
        return len(self.data)

    def take(self, numbers: Sequence[int]) -> list[TokenRow]:
        """(prompt ids, label ids) of these rows."""
        prompts = []
        for row in to_rows(self.rows.take(list(numbers))):
            own = [Example(row.query, row.answer)] if self.shows_labels else []
            prompts.append(self.encoder.row(row.query, [*self.examples.get(row.id, ()), *own], row.documents))
        return list(zip(prompts, (label for _, label in self.data.take(numbers)), strict=True))
