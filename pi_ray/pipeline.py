"""The main job as one short function: prepare -> train -> baseline -> evaluate -> report -> publish.

Each step reads the run directory, is skipped when it is up to date, and can be run alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from pi_ray import cluster
from pi_ray.artifact import read_manifest, write_atomic
from pi_ray.config import RunConfig, dump
from pi_ray.progress import Watch, training
from pi_ray.rundir import RunDir, phases_of, plain_config
from pi_ray.train.updates import phase_updates


def run(config: RunConfig, console: Console) -> Path:
    """All steps in a row. Returns the published adapter's folder."""
    prepare(config, console)
    train(config, console)
    evaluate(config, console)
    report(config, console)
    return publish(config, console)


def prepare(config: RunConfig, console: Console) -> None:
    from pi_ray import prepare as step

    _begin(config, console, "Prepare", "templates at each rate, examples for each row, one dataset for each phase")
    for name, c in _arms(config):
        step.prepare(c, lambda line, name=name: console.print(f"  {name}{line}", highlight=False))


def train(config: RunConfig, console: Console) -> None:
    from pi_ray.train import loop

    _begin(config, console, "Train", f"LoRA rank {config.train.lora.rank} through the phases, {config.train.workers} worker(s), {config.train.backend.name}")
    for name, c in _arms(config):
        if loop.is_trained(c):
            console.print(f"  {name}nothing to do, every phase has its adapter", highlight=False)
            continue
        loop.fingerprint_of(c)
        costs = _costs(c)
        with Watch(console, f"  {name or 'promptintern: '}update", len(costs)) as watch:
            loop.train(c, training(watch, costs))


def evaluate(config: RunConfig, console: Console) -> dict[str, Any]:
    from pi_ray import evaluate as step
    from pi_ray.results import table

    _begin(config, console, "Evaluate", "held-out test rows, temperature 0")
    columns = step.columns_of(config)
    rows = len(RunDir(config.root).read_rows("test"))
    total = len(columns) * (rows + min(rows, config.evaluate.latency_rows))
    done: dict[str, int] = {}
    with Watch(console, "  rows", total) as watch:

        def listen(column: str, n: int, of: int) -> None:
            done[column] = n
            watch.to(sum(done.values()), column)

        summary = step.evaluate(config, listen)
    console.print(table(summary))
    return summary


def report(config: RunConfig, console: Console) -> Path:
    from pi_ray.report import write_report

    path = write_report(RunDir(config.root), config)
    console.print(f"[bold]Report[/]  {_short(path)}", highlight=False)
    return path


def publish(config: RunConfig, console: Console, name: str = "") -> Path:
    from pi_ray import publish as step

    folder = step.publish(RunDir(config.root), config, name)
    console.print(f"[bold]Published[/]  {_short(folder)}", highlight=False)
    return folder


def _begin(config: RunConfig, console: Console, step: str, what: str) -> None:
    console.print(f"[bold]{step}[/]  {what}", highlight=False)
    path, text = RunDir(config.root).config, dump(config)
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)
    cluster.connect()


def _arms(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """What is prepared and trained: the run, and its baseline (a schedule, not code)."""
    return [("", config), *([("plain: ", plain_config(config))] if config.evaluate.baseline else [])]


def _costs(config: RunConfig) -> list[float]:
    """Tokens that pass through the model in each update, from the prepared phases: what an update takes."""
    costs: list[float] = []
    for i, phase in phases_of(config):
        manifest = read_manifest(RunDir(config.root).phase(i))
        tokens, copies = manifest["tokens"], config.train.workers if config.train.share_prefix else config.train.batch_size
        cost = copies * tokens["prefix"] + config.train.batch_size * (tokens["row_mean"] + tokens["label_mean"] - 1)
        costs += [cost] * phase_updates(manifest["rows"], phase, config.train.batch_size)
    return costs


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
