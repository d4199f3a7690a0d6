"""The run directory: where each step writes and the next one reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.prompt import Example
from pi_ray.protocols import SPLITS, UNLABELLED, Row
from pi_ray.run.artifact import read_manifest, read_parquet
from pi_ray.run.phases import rate_name

if TYPE_CHECKING:
    from pi_ray.run.row_store import StoredRows


class RunDir:
    """Paths and small readers of one run directory."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.config = self.root / "run.yaml"
        self.rejects = self.root / "rejects.jsonl"
        self.rows = self.root / "rows"  # artefact: train/dev/test.parquet (and unlabelled.parquet) with columns id, query, answer, group, documents
        self.templates = self.root / "templates"  # artefact: templates.json and one readable .txt for each rate
        self.documents = self.root / "documents"  # artefact: documents of rows as each phase has them, where rows have any (compress/documents.py)
        self.neighbours = self.root / "neighbours.parquet"  # id, split, neighbours: list<string>, scores: list<float> (best first)
        self.phases = self.root / "phases"  # one artefact for each phase, and "dev" (dev rows with the last phase's prompt)
        self.teacher_answers = self.root / "teacher_answers"  # artifact: the teacher's answers, how sure it was (train/distill.py)
        self.checkpoints = self.root / "checkpoints"
        self.adapters = self.root / "adapters"
        self.best = self.adapters / "best"  # link to the phase adapter with the highest dev accuracy
        self.train_log = self.root / "train.jsonl"
        self.evaluation = self.root / "eval"
        self.report = self.root / "report.html"

    def phase(self, index: int | str) -> Path:
        return self.phases / str(index)

    def adapter(self, phase: int) -> Path:
        return self.adapters / f"phase-{phase}"

    def baseline(self, name: str) -> RunDir:
        """The run directory of a baseline that is trained beside the run, such as "plain"."""
        return RunDir(self.root / "baselines" / name)

    def rows_of(self, split: str) -> StoredRows:
        """The rows of a split, read as they are asked for."""
        from pi_ray.run.row_store import StoredRows

        return StoredRows(self.rows / f"{split}.parquet")

    def read_rows(self, split: str, rate: float = 1.0, begin: int = 0, end: int | None = None) -> list[Row]:
        """Rows [begin, end) of a split, with what a template rate of `rate` leaves of the documents that come with them: all at 1, none at 0."""
        from pi_ray.run.row_store import read_range

        rows = self.rows_of(split)[begin:end]
        if rate == 1 or not any(r.documents for r in rows):
            return rows
        if not rate:
            return [replace(r, documents=()) for r in rows]
        left = read_range(self.documents / documents_file(split, rate), begin, end)["documents"].to_pylist()
        return [replace(r, documents=tuple(texts)) for r, texts in zip(rows, left, strict=True)]

    def read_shots(self, split: str, bank: Mapping[str, Row | Example], k: int, begin: int = 0, end: int | None = None) -> dict[str, list[Example]]:
        """row id -> its k examples, least similar first (the best one next to the query), of rows [begin, end). `bank` maps ids to training rows."""
        if not k:
            return {}
        table = self._neighbours(split, begin, end) if begin or end is not None else read_parquet(self.neighbours, filters=[("split", "=", split)])
        return {r["id"]: [Example(bank[n].query, bank[n].answer) for n in reversed(r["neighbours"][:k])] for r in table.to_pylist()}

    def _neighbours(self, split: str, begin: int, end: int | None) -> Any:
        """Rows [begin, end) of a split in neighbours.parquet, which has the splits one after another."""
        from pi_ray.run.row_store import read_range

        counts = read_manifest(self.rows)["rows"]
        order = [s for s in (*SPLITS, UNLABELLED) if s in counts]
        start = sum(counts[s] for s in order[: order.index(split)])
        return read_range(self.neighbours, start + begin, start + (counts[split] if end is None else end))


def documents_file(split: str, rate: float) -> str:
    """Where documents/ has those of a split at a template rate."""
    return f"{split}-{rate_name(rate)}.parquet"
