"""The main job as one short function: prepare -> train -> baseline -> evaluate -> report -> publish.

Each step reads the run directory, is skipped when it is up to date, and can be run alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pi_ray.cluster import session
from pi_ray.config import RunConfig, dump
from pi_ray.experiments.sweep import Family, Member, complete
from pi_ray.progress import Watch, training
from pi_ray.run.artifact import digest, read_manifest, write_atomic
from pi_ray.run.baseline import plain_config
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import phases_of
from pi_ray.train.updates import phase_updates


def run(config: RunConfig, console: Console) -> Path:
    """All steps in a row. Returns the published adapter's folder, or the report where there is none to publish."""
    prepare(config, console)
    train(config, console)
    evaluate(config, console)
    page = report(config, console)
    return publish(config, console) if is_served(config) else page


def is_closed(config: RunConfig) -> bool:
    """Whether a service has the model, so that there is no adapter to publish."""
    from pi_ray import hosted

    return config.train.backend.name == hosted.BACKEND


def is_served(config: RunConfig) -> bool:
    """Whether a run ends with an adapter that can be published and served; gist tokens are a baseline that is only evaluated."""
    return not is_closed(config) and not config.train.gist


def prepare(config: RunConfig, console: Console) -> None:
    from pi_ray.data import prepare as step

    _begin(config, console, "Prepare", "templates at each rate, examples for each row, one dataset for each phase")
    for name, c in _arms(config):
        step.prepare(c, lambda line, name=name: console.print(f"  {name}{line}", highlight=False))


def train(config: RunConfig, console: Console) -> None:
    from pi_ray.report.loss_plot import drawing
    from pi_ray.train import launch

    if is_closed(config):
        return _tune(config, console)
    _begin(config, console, "Train", f"LoRA rank {config.train.lora.rank} through the phases, {config.train.workers} worker(s), {config.train.backend.name}")
    for name, c in _arms(config):
        if launch.is_trained(c):
            console.print(f"  {name}nothing to do, every phase has its adapter", highlight=False)
            continue
        launch.fingerprint_of(c)
        costs = _costs(c)
        with Watch(console, f"  {name or 'promptintern: '}update", len(costs)) as watch:
            launch.train(c, drawing(RunDir(c.root), training(watch, costs)))


def _tune(config: RunConfig, console: Console) -> None:
    from pi_ray import hosted

    _begin(config, console, "Train", f"{config.closed.model} through the phases, one fine-tuning job each, on {config.closed.base_url or 'OpenAI'}")
    for name, c in _arms(config):
        columns = {"columns": ("plain",)} if name else {}
        model = hosted.tune(c, lambda e, name=name: console.print(f"  {name}phase {e['phase']}: {e['message']}", highlight=False), hosted.ask(), **columns)
        console.print(f"  {name}{model}", highlight=False)


def evaluate(config: RunConfig, console: Console) -> dict[str, Any]:
    from pi_ray.evaluate import columns
    from pi_ray.evaluate import hosted as hosted_step
    from pi_ray.report.summary import table

    summary = _evaluate(config, (hosted_step if is_closed(config) else columns).columns_of(config), console)
    console.print(table(summary))
    return summary


def _evaluate(config: RunConfig, columns: Sequence[Any], console: Console) -> dict[str, Any]:
    from pi_ray import hosted
    from pi_ray.evaluate import evaluate as step
    from pi_ray.evaluate import hosted as hosted_step

    _begin(config, console, "Evaluate", f"{config.evaluate.split} rows, temperature 0")
    rows = len(RunDir(config.root).read_rows(config.evaluate.split))
    total = len(columns) * (rows + min(rows, config.evaluate.latency_rows))
    done: dict[str, int] = {}
    with Watch(console, "  rows", total) as watch:

        def listen(column: str, n: int, of: int) -> None:
            done[column] = n
            watch.to(sum(done.values()), column)

        if is_closed(config):
            return hosted_step.evaluate(config, listen, columns, hosted.ask())
        return step.evaluate(config, listen, columns)


def table(family: Family, console: Console, command: str) -> Path:
    """Run what a family still lacks, print its table, and merge its numbers into the results file, whose path is returned."""
    from pi_ray.evaluate import columns as ways
    from pi_ray.evaluate import hosted as hosted_step
    from pi_ray.experiments import table as page

    def column(member: Member) -> Any:
        if not member.trained:
            return ways.untrained(member.config)
        return (hosted_step if is_closed(member.config) else ways).trained(member.config)

    complete(
        family, lambda c: prepare(c, console), lambda c: train(c, console), lambda m: _evaluate(m.config, [column(m)], console),
        lambda line: console.rule(line, align="left"),
    )
    first = [m for m in family.members if m.seed == family.config.seeds[0]]
    speeds = {} if is_closed(family.base) else _speeds(family, [(m.column, column(m), m.config) for m in first], console)
    columns = page.read(family)
    rows = list(page.lines(family, columns, speeds))
    write_atomic(family.base.root / f"table-{family.config.table}.md", page.markdown(rows))
    for part in page.render(f"Table {family.config.table}: {family.config.title}", rows):
        console.print(part)
    if sentence := page.gap(family, columns)[0]:
        console.print(sentence, highlight=False)
    path = family.source.resolve().parent / family.config.results
    page.merge(path, page.entries(family, columns, speeds, command))
    console.print(f"[bold]Numbers[/]  {_short(path)}", highlight=False)
    return path


def _speeds(family: Family, columns: list[Any], console: Console) -> dict[str, Any]:
    """Seconds of each column on one engine, measured once for these adapters."""
    from pi_ray.evaluate import columns
    from pi_ray.evaluate import evaluate as step

    path = family.base.root / f"speed-{digest([(name, c.adapter, c.template, c.shots) for name, c, _ in columns])[:12]}.json"
    if not path.exists():
        with Watch(console, "  seconds a request", family.base.evaluate.latency_rows * len(columns)) as watch:
            write_atomic(path, json.dumps(step.speed(columns, watch.to), indent=1) + "\n")
    return json.loads(path.read_bytes())


def report(config: RunConfig, console: Console) -> Path:
    from pi_ray.report.page import write_report

    path = write_report(RunDir(config.root), config)
    console.print(f"[bold]Report[/]  {_short(path)}", highlight=False)
    return path


def publish(config: RunConfig, console: Console, name: str = "") -> Path:
    from pi_ray.store import publish as step

    folder = step.publish(RunDir(config.root), config, name)
    where = f"{config.store.rstrip('/')}/{folder.parent.name}/{folder.name}" if "://" in config.store else _short(folder)
    console.print(f"[bold]Published[/]  {where}", highlight=False)
    return folder


def _begin(config: RunConfig, console: Console, step: str, what: str) -> None:
    console.print(f"[bold]{step}[/]  {what}", highlight=False)
    path, text = RunDir(config.root).config, dump(config.replace(**{"closed.confirmed": False}))  # a yes to spending is for one command
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)
    session.connect()


def _arms(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """What is prepared and trained: the run, and its baseline (a schedule, not code)."""
    return [("", config), *([("plain: ", plain_config(config))] if config.evaluate.baseline else [])]


def _costs(config: RunConfig) -> list[float]:
    """Tokens that pass through the model in each update, from the prepared phases: what an update takes."""
    from pi_ray.plan import estimate
    from pi_ray.train.batches import longest_of

    size = estimate.model_size(config.model, config.train.lora, longest_of(RunDir(config.root).phases))
    costs, copies = [], config.train.workers if estimate.shares_prefix(size, config) else config.train.batch_size
    for i, phase in phases_of(config):
        manifest = read_manifest(RunDir(config.root).phase(i))
        tokens = manifest["tokens"]
        cost = copies * tokens["prefix"] + config.train.batch_size * (tokens["row_mean"] + tokens["label_mean"] - 1)
        costs += [cost] * phase_updates(manifest["rows"], phase, config.train.batch_size)
    return costs


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
