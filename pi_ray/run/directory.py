"""The run directory: where each step writes and the next one reads, and the fingerprints by which a step knows that it is done.

A fingerprint hashes what a step's output depends on, so that a change of `serve.port` retrains nothing. Preparation has one for all that it makes:
a change of `retrieve` makes templates and documents again too, from the cache of compressed text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray import __version__
from pi_ray.config import INPUTS, RunConfig
from pi_ray.prompt import Example
from pi_ray.protocols import SPLITS, UNLABELLED, Row
from pi_ray.run.artifact import digest, read_manifest, read_parquet
from pi_ray.schedule import Phase, plan_phases

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
        self.taught = self.root / "taught"  # artefact: what the teacher answered and how sure it was (train/teach.py)
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


def rate_name(rate: float) -> str:
    return f"{rate:.2f}" if round(rate, 2) == rate else str(rate)


def distinct_rates(config: RunConfig) -> list[float]:
    """Every template rate that the run needs, largest first; always with 1.0, which the full-prompt baseline uses."""
    return sorted({1.0, *(p.rate for p in plan_phases(config.schedule))} - {0.0}, reverse=True)


def most_shots(config: RunConfig) -> int:
    return max(config.evaluate.shots, *(p.shots for p in plan_phases(config.schedule)))


def plain_config(config: RunConfig) -> RunConfig:
    """Plain fine-tuning without a prompt: rate 0 and no shots in every phase, so the same rows, updates and learning rates as the run."""
    phases = [{"rate": 0.0, "shots": 0, "epochs": p.epochs, "steps": p.steps} for p in plan_phases(config.schedule)]
    own = {"schedule": {"name": "list", "list": phases}, "evaluate.shots": 0, "train.objective": "sft", "train.gist": 0, "train.start": ""}
    return config.replace(run_dir=str(RunDir(config.root).baseline("plain").root), **own)


def prepare_fingerprint(config: RunConfig, task_fingerprint: str) -> str:
    phases = [(p.rate, p.shots) for p in plan_phases(config.schedule)]
    made_from = [__version__, task_fingerprint, _dump(config, "task", "model", "prompt", "compress", "retrieve"), phases, most_shots(config)]
    return digest([*made_from, UNLABELLED] if wants_unlabelled(config) else made_from)


def wants_unlabelled(config: RunConfig) -> bool:
    """Whether a teacher answers queries that have no answer."""
    return config.train.objective != "sft"


UNLEARNED = {"max_failures", "keep_checkpoints", "checkpoint_every", "collective_timeout_s", "tracker", "attention"}  # keys that do not change what is learned
SPREAD = ("workers", "micro_batch")  # how the rows of an update are spread, which changes rounding alone: a run may go on with others


def train_fingerprint(config: RunConfig, prepare: str) -> str:
    return digest([prepare, _learned(config), [(p.rate, p.shots, p.epochs, p.steps) for p in plan_phases(config.schedule)]])


def _learned(config: RunConfig) -> dict[str, Any]:
    """The keys of `train` that change what is learned. SPREAD stands in it with its defaults, which keeps earlier fingerprints."""
    unused = {*UNLEARNED, *(set() if wants_unlabelled(config) else {"distill"}), *(set() if config.train.early_stop else {"dev_every"})}
    same = config.train.model_copy(update={key: type(config.train).model_fields[key].default for key in SPREAD})
    return same.model_dump(mode="json", exclude=unused)


def learned_from(config: RunConfig) -> dict[str, Any]:
    """What an adapter depends on besides rows and template, as dotted key -> value: for saying what has changed."""
    return _flat({**_dump(config, "task", "model", "prompt", "compress", "retrieve", "schedule"), "train": _learned(config)})


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}" if key else name).items()}


def evaluate_fingerprint(config: RunConfig, columns: list[tuple[str, str]]) -> str:
    """`columns` are (name, fingerprint of the adapter, or of the rows for the bare base)."""
    return digest([columns, _dump(config, "evaluate")])


def _dump(config: RunConfig, *blocks: str) -> dict[str, Any]:
    """Those blocks without the paths of rows and template: the task's fingerprint has what is in these files, and a project may be moved."""
    return {b: getattr(config, b).model_dump(mode="json", exclude=set(INPUTS) if b == "task" else None) for b in blocks}


def phases_of(config: RunConfig) -> Iterator[tuple[int, Phase]]:
    yield from enumerate(plan_phases(config.schedule))
