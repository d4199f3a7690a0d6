"""The run directory: where each step writes and the next one reads, and the fingerprints by which a step knows that it is done.

Every fingerprint hashes what the step's output depends on and nothing else, so that a change of `serve.port` retrains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pi_ray import __version__
from pi_ray.artifact import digest
from pi_ray.config import RunConfig
from pi_ray.prompt import Example
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.schedule import Phase, plan_phases


class RunDir:
    """Paths and small readers of one run directory."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        self.config = self.root / "run.yaml"
        self.rejects = self.root / "rejects.jsonl"
        self.rows = self.root / "rows"  # artefact: train/dev/test.parquet (and unlabelled.parquet) with columns id, query, answer, group
        self.templates = self.root / "templates"  # artefact: templates.json and one readable .txt for each rate
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

    def read_rows(self, split: str) -> list[Row]:
        import pyarrow.parquet as pq

        return [Row(**r) for r in pq.read_table(self.rows / f"{split}.parquet").to_pylist()]

    def read_shots(self, split: str, bank: dict[str, Row], k: int) -> dict[str, list[Example]]:
        """row id -> its k examples, least similar first (the best one next to the query). `bank` maps ids to training rows."""
        import pyarrow.parquet as pq

        if not k:
            return {}
        table = pq.read_table(self.neighbours, filters=[("split", "=", split)]).to_pylist()
        return {r["id"]: [Example(bank[n].query, bank[n].answer) for n in reversed(r["neighbours"][:k])] for r in table}


def distinct_rates(config: RunConfig) -> list[float]:
    """Every template rate that the run needs, largest first; always with 1.0, which the full-prompt baseline uses."""
    return sorted({1.0, *(p.rate for p in plan_phases(config.schedule))} - {0.0}, reverse=True)


def most_shots(config: RunConfig) -> int:
    return max(config.evaluate.shots, *(p.shots for p in plan_phases(config.schedule)))


def plain_config(config: RunConfig) -> RunConfig:
    """Plain fine-tuning without a prompt: rate 0 and no shots in every phase, so the same rows, updates and learning rates as the run."""
    phases = [{"rate": 0.0, "shots": 0, "epochs": p.epochs, "steps": p.steps} for p in plan_phases(config.schedule)]
    own = {"schedule": {"name": "list", "list": phases}, "evaluate.shots": 0, "train.objective": "sft", "train.gist": 0}
    return config.replace(run_dir=str(RunDir(config.root).baseline("plain").root), **own)


def prepare_fingerprint(config: RunConfig, task_fingerprint: str) -> str:
    phases = [(p.rate, p.shots) for p in plan_phases(config.schedule)]
    made_from = [__version__, task_fingerprint, _dump(config, "task", "model", "prompt", "compress", "retrieve"), phases, most_shots(config)]
    return digest([*made_from, UNLABELLED] if wants_unlabelled(config) else made_from)


def wants_unlabelled(config: RunConfig) -> bool:
    """Whether a teacher answers queries that have no answer."""
    return config.train.objective != "sft"


def train_fingerprint(config: RunConfig, prepare: str) -> str:
    """The number of restarts and of kept checkpoints does not change what is learned, so it is left out."""
    unused = set() if wants_unlabelled(config) else {"distill"}
    train = config.train.model_dump(mode="json", exclude={"max_failures", "keep_checkpoints", "checkpoint_every", *unused})
    return digest([prepare, train, [(p.rate, p.shots, p.epochs, p.steps) for p in plan_phases(config.schedule)]])


def evaluate_fingerprint(config: RunConfig, columns: list[tuple[str, str]]) -> str:
    """`columns` are (name, fingerprint of the adapter, or of the rows for the bare base)."""
    return digest([columns, _dump(config, "evaluate")])


def _dump(config: RunConfig, *blocks: str) -> dict[str, Any]:
    return {b: getattr(config, b).model_dump(mode="json") for b in blocks}


def phases_of(config: RunConfig) -> Iterator[tuple[int, Phase]]:
    yield from enumerate(plan_phases(config.schedule))
