"""The run directory: where each step writes and the next one reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pi_ray.errors import CorruptArtifactError, TrainingError
from pi_ray.prompt import Example
from pi_ray.protocols import SPLITS, UNLABELLED, Row
from pi_ray.run.artifact import read_manifest, write_atomic

if TYPE_CHECKING:
    from pi_ray.run.row_store import StoredRows

PHASE_ADAPTER = re.compile(r"phase-\d+", re.ASCII)
CARD_FILE = "pi_ray.json"  # of an adapter: what it was trained on, and with which prompt


class RunDir:
    """Paths and small readers of one run directory."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.config = self.root / "run.yaml"
        self.rejects = self.root / "rejects.jsonl"
        self.answered = self.root / "answered"  # artifact: rows that a teacher made of queries alone (answered.py)
        self.answer_log = self.root / "answers.jsonl"  # what the base answered so far, from which answering goes on
        self.rows = self.root / "rows"  # artifact: one Parquet file for each split (row_store.SCHEMA)
        self.queries = self.root / "queries"  # artifact: queries that were generated from the template (queries.py)
        self.templates = self.root / "templates"  # artifact: templates.json and one readable .txt for each rate
        self.documents = self.root / "documents"  # artifact: rows' documents at each template rate (row_documents.py)
        self.neighbours = self.root / "neighbours.parquet"  # id, split, neighbours and their scores, best first
        self.phases = self.root / "phases"  # an artifact for each phase, and "dev": dev rows with the last one's prompt
        self.teacher_answers = self.root / "teacher_answers"  # artifact: its answers, and how sure it was (distill.py)
        self.teaching_log = self.root / "teacher_answers.jsonl"  # what actors answered so far of the one above
        self.student_answers = self.root / "student_answers"  # artifacts round-0000, ...: on_policy.py
        self.checkpoints = self.root / "checkpoints"
        self.adapters = self.root / "adapters"
        self.best_file = self.adapters / "best.json"  # names the phase adapter that dev rows, or the floor, chose
        self.train_log = self.root / "train.jsonl"
        self.evaluation = self.root / "eval"
        self.generation_log = self.root / "generated.jsonl"  # what evaluation generated, so that none of it is again
        self.report = self.root / "report.html"

    @property
    def best(self) -> Path:
        """The folder of the adapter that was chosen; before one is, a path where nothing is.

        Raises CorruptArtifactError for a file that names no phase's adapter.
        """
        try:
            chosen = json.loads(self.best_file.read_bytes())["adapter"]
            if PHASE_ADAPTER.fullmatch(chosen):
                return self.adapters / chosen
        except FileNotFoundError:
            return self.best_file
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise CorruptArtifactError(f"{self.best_file}: names no adapter of a phase; delete it, and train again")

    def choose_best(self, phase: int) -> None:
        """Have `best` be the adapter of this phase."""
        write_atomic(self.best_file, json.dumps({"adapter": self.adapter(phase).name}))

    def phase(self, index: int | str) -> Path:
        return self.phases / str(index)

    def adapter(self, phase: int) -> Path:
        return self.adapters / f"phase-{phase}"

    def writer(self) -> RunDir:
        """The run directory of the adapter that learns to write queries."""
        return RunDir(self.root / "writer")

    def baseline(self, name: str) -> RunDir:
        """The run directory of a baseline that is trained beside the run, such as "plain"."""
        return RunDir(self.root / "baselines" / name)

    def rows_of(self, split: str) -> StoredRows:
        from pi_ray.run.row_store import StoredRows

        return StoredRows(self.rows / f"{split}.parquet")

    def read_rows(self, split: str, rate: float = 1.0, begin: int = 0, end: int | None = None) -> list[Row]:
        """Rows [begin, end) of a split, with their documents as compressed to `rate`: whole at 1, none at 0."""
        from pi_ray.run.row_store import read_range

        rows = self.rows_of(split)[begin:end]
        if rate == 1 or not any(r.documents for r in rows):
            return rows
        if not rate:
            return [replace(r, documents=()) for r in rows]
        left = read_range(self.documents / documents_file(split, rate), begin, end)["documents"].to_pylist()
        return [replace(r, documents=tuple(texts)) for r, texts in zip(rows, left, strict=True)]

    def read_shots(
        self, split: str, bank: Mapping[str, Row | Example], k: int, begin: int = 0, end: int | None = None
    ) -> dict[str, list[Example]]:
        """Row id of [begin, end) -> its k examples from `bank` (by id), the most similar last: next to the query."""
        if not k:
            return {}
        from pi_ray.run.row_store import read_range

        counts = (read_manifest(self.rows) or {})["rows"]
        order = [s for s in (*SPLITS, UNLABELLED) if s in counts]  # in which neighbours.parquet has the splits
        start = sum(counts[s] for s in order[: order.index(split)])
        found = read_range(self.neighbours, start + begin, start + (counts[split] if end is None else end)).to_pylist()
        best = {r["id"]: [bank[n] for n in r["neighbours"][:k]] for r in found}
        return {row: [Example(e.query, e.answer) for e in reversed(examples)] for row, examples in best.items()}

    def read_templates(self) -> dict[float, str]:
        """rate -> template text; rate 0 is no template."""
        entries = json.loads((self.templates / "templates.json").read_bytes())
        return {**{e["rate"]: e["text"] for e in entries}, 0.0: ""}

    def prepared_fingerprint(self) -> str:
        """The fingerprint of the prepared rows. Raises TrainingError where nothing was prepared."""
        manifest = read_manifest(self.rows)
        if manifest is None:
            cure = "run 'pi-ray prepare' (or 'pi-ray run') with this run.yaml first"
            raise TrainingError(f"{self.root}: nothing prepared; {cure}")
        return manifest["fingerprint"]


def rate_name(rate: float) -> str:
    return f"{rate:.2f}" if round(rate, 2) == rate else str(rate)


def documents_file(split: str, rate: float) -> str:
    """The file in documents/ with a split's documents as compressed to a template rate."""
    return f"{split}-{rate_name(rate)}.parquet"
