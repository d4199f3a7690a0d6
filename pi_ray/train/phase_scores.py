"""Scores of a trained run's phases on dev rows, by which a phase is chosen: as training left them, or computed anew.

Where task.metric decides, training leaves each phase's answers, so that another metric chooses again without training.
"""

import json
import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple, TypeVar

from pi_ray.config import RunConfig
from pi_ray.protocols import Task
from pi_ray.registry import tasks
from pi_ray.run.artifact import MANIFEST_HASH, digest, read_manifest, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import training_metric_settings
from pi_ray.schedule import plan_phases
from pi_ray.tasks.dataset import score_rows

# Files of an adapter folder: metric -> its value for each dev row; or the answer to each; both in their order.
DEV_SCORES, DEV_ANSWERS = "dev_scores.json", "dev_answers.json"
MOST_ROWS = 500  # dev rows that are scored: more would cost more than they tell

PhaseScores = list[dict[str, list[float]]]  # of each phase: metric -> its value for each dev row
T = TypeVar("T")


class BestPhase(NamedTuple):
    """The phase whose answers have the highest mean of the first metric."""

    phase: int
    metric: str
    score: float


def scored_rows(rows: Sequence[T]) -> Sequence[T]:
    """At most MOST_ROWS dev rows, evenly spread over the split, because files are often sorted."""
    return rows[:: math.ceil(len(rows) / MOST_ROWS)]


def read_phase_scores(config: RunConfig) -> PhaseScores:
    """The scores of a run whose phases all have their adapters; the metrics of task.metric come in their order.

    Those of task.metric are computed once for each metric and kept beside the adapters. Raises what scoring raises.
    """
    run = RunDir(config.root)
    folders = [run.adapter(i) for i in range(len(plan_phases(config.schedule)))]
    if not config.training_metric:
        return [json.loads((folder / DEV_SCORES).read_bytes()) for folder in folders]
    trained = [(read_manifest(folder) or {}).get(MANIFEST_HASH) for folder in folders]
    path = run.adapters / f"scores-{digest([trained, training_metric_settings(config)])[:12]}.json"
    if path.exists():
        return json.loads(path.read_bytes())
    task: Task = tasks[config.task.name](config.task)
    rows, found = scored_rows(run.read_rows("dev")), PhaseScores()
    for folder in folders:
        scores = score_rows(task, rows, json.loads((folder / DEV_ANSWERS).read_bytes()))
        found.append({name: [score[name] for score in scores] for name in scores[0]})
    write_atomic(path, json.dumps(found) + "\n")
    return found


def best_by_metric(config: RunConfig) -> BestPhase:
    """The phase that task.metric chooses; of equals the later."""
    scores = read_phase_scores(config)
    metric = next(iter(scores[0]))
    means = [fmean(values[metric]) for values in scores]
    best = max(range(len(means)), key=lambda i: (means[i], i))
    return BestPhase(best, metric, means[best])
