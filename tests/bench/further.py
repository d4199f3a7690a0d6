"""A desk's adapters on many messages that its run never saw: exact match of seen and hidden subjects, with intervals.

    python -m tests.bench.further RUN_DIRECTORY [--rows 1500]

The run is one of `python -m tests.bench.internalise task.name=desk ...`, with or without its baseline. Its own test
rows are few, so that a difference of three points between two runs says nothing; these are messages of the data set's
training split that no split of the run has, the same ones for each run of the same rows. The query alone is asked.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import joblib
import torch
import yaml

from pi_ray.config import RunConfig
from pi_ray.evaluate.columns import columns_of
from pi_ray.evaluate.generation_workers import LoadedAdapters
from pi_ray.evaluate.statistics import paired_mean, score_interval
from pi_ray.models import load_model, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row, Task
from pi_ray.registry import tasks
from pi_ray.run.directory import RunDir
from pi_ray.train.generation import generate_greedy
from tests.bench.report import header, last_line

BATCH = 64
SPLITS = ("train", "dev", "test", "unlabelled")
GROUPS, COLUMNS, RESAMPLES = ("seen", "hidden"), ("plain", "promptintern"), 2000


def further_rows(task: Task, run: RunDir, count: int) -> list[Row]:
    """`count` rows of the task's training split whose query no split of the run has."""
    used = {row.query for split in SPLITS for row in run.rows_of(split)}
    left = [row for row in task.read_split("train") if isinstance(row, Row) and row.query not in used]
    return random.Random(0).sample(left, min(count, len(left)))


def ask(config: RunConfig, rows: list[Row], hidden: set[str]) -> dict[str, dict[str, list[float]]]:
    """Adapter -> group -> 1 for each of its rows that is answered right, 0 for the others."""
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    columns = [c for c in columns_of(config) if c.name in COLUMNS and Path(c.adapter).is_dir()]
    loaded = LoadedAdapters(load_model(config.model), [c.adapter for c in columns])
    prompts, end = [encoder.row(row.query) for row in rows], encoder.tokenizer.eos_token_id
    limit = 2 * max(len(encoder.answer(row.answer)) for row in rows)
    right: dict[str, dict[str, list[float]]] = {}
    for column in columns:
        loaded.activate(column.adapter)
        groups = right.setdefault(column.name, {group: [] for group in GROUPS})
        for start in range(0, len(rows), BATCH):
            some = slice(start, start + BATCH)
            outputs = generate_greedy(loaded.model, encoder.prefix(column.template), prompts[some], limit, end)
            for row, ids in zip(rows[some], outputs, strict=True):
                group = GROUPS[row.answer in hidden]
                groups[group].append(float(encoder.decode(ids).strip() == row.answer))
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=1500)
    args = parser.parse_args()
    header("a desk's adapters on further messages")
    torch.set_num_threads(joblib.cpu_count())
    config = RunConfig.model_validate(yaml.safe_load((args.run / "run.yaml").read_text()))
    task: Any = tasks[config.task.name](config.task)
    if config.task.name != "desk":
        raise SystemExit(f"{args.run} is a run of the task {config.task.name}; this bench takes desks")
    right, figures = ask(config, further_rows(task, RunDir(args.run), args.rows), set(task.unseen)), dict[str, float]()
    for name, groups in right.items():
        for group, values in groups.items():
            share, low, high = score_interval(values, RESAMPLES, 0)
            print(f"  {name:13} {group:7} {100 * share:.1f}% of {len(values)} ({100 * low:.1f} to {100 * high:.1f})")
            figures |= {f"{name}_{group}": share, f"{group}_rows": len(values)}
    if len(right) == len(COLUMNS):
        mean, low, high, p = paired_mean(*(right[name]["seen"] for name in reversed(COLUMNS)), RESAMPLES, 0)
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        print(f"  promptintern before plain, seen: {100 * mean:+.1f} ({interval}), p = {p:.3f}")
        figures |= {"seen_before_plain": mean, "p": p}
    last_line(**figures)


if __name__ == "__main__":
    main()
