"""The main job as one short function: prepare, train (the run and its baseline), evaluate, report, publish.

Each step reads the run directory, is skipped when it is up to date, and can be run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pi_ray import hosted
from pi_ray.config import RunConfig, dump_config
from pi_ray.hosted.tuning import COLUMNS
from pi_ray.plan.estimate import tokens_of_updates
from pi_ray.progress import ProgressLine, training_listener
from pi_ray.run.answered import answered_config, require_queries
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import plain_finetuning_config
from pi_ray.store.publish import publish_adapter
from pi_ray.train import launch
from pi_ray.train.floor import decide_floor
from pi_ray.train.replicas import check_replica
from pi_ray.train.vllm_batches import choose_engine

if TYPE_CHECKING:
    from pi_ray.evaluate.columns import Column


def run(config: RunConfig, console: Console) -> Path:
    """All steps in a row. Returns the published adapter's folder, or the report where there is none to publish.

    Raises ConfigError before the first step for a base model that no node holds in the last ones, and for an engine of
    evaluation that is not installed.
    """
    check_replica(config)
    if config.evaluate.engine == "vllm":
        choose_engine(config, [])
    prepare(config, console)
    train(config, console)
    evaluate(config, console)
    page = report(config, console)
    return publish(config, console) if is_served(config) else page


def is_served(config: RunConfig) -> bool:
    """Whether the run ends with an adapter to publish: a service keeps its models, gist tokens are only evaluated."""
    return not hosted.is_hosted(config) and not config.train.gist


def ask(config: RunConfig, console: Console) -> dict[str, Any]:
    """Generate queries from the template, and return the manifest of the artifact queries/."""
    from pi_ray.ask.ask import ask_queries
    from pi_ray.ask.sources import task_sources

    _begin(config, console, "Ask", "a writer's queries about every unit of the template, for the teacher to answer")
    with ExitStack() as shown:

        @cache
        def listener() -> Callable[[dict[str, Any]], None]:
            """Made with the first entry: no other writer than an adapter is trained."""
            line = shown.enter_context(ProgressLine(console, "  writer: update", config.ask.updates))
            return training_listener(line, [1.0] * config.ask.updates)

        tell = partial(_print_line, console, "")
        return ask_queries(
            config, task_sources(config), hosted.ask_on_terminal, tell, lambda entry: listener()(entry)
        )


def answer(config: RunConfig, console: Console) -> dict[str, Any]:
    """Have a teacher answer queries that nobody has labelled, and return how that went: the facts of answered/."""
    from pi_ray.answer.rows import make_answered_rows

    endpoint = config.train.distill.teacher == "endpoint"
    who = f"{config.closed.model} on {config.closed.base_url or 'OpenAI'}" if endpoint else "the base model"
    _begin(config, console, "Answer", f"{who} answers the queries with the whole prompt, for the adapter to learn")
    with ProgressLine(console, "  queries", 0) as shown:

        def listen(done: int, total: int) -> None:
            shown.total = total
            shown.update(done)

        return make_answered_rows(config, hosted.ask_on_terminal, partial(_print_line, console, ""), listen)


def prepare(config: RunConfig, console: Console) -> None:
    """Asks first where queries are generated, and then has a teacher answer where its answers are the rows."""
    from pi_ray.data import prepare as step
    from pi_ray.evaluate.judge import judges_of

    require_queries(config)
    judges_of(config)
    if config.task.generate:
        ask(config, console)
    if config.answers_first:
        answer(config, console)
    _begin(config, console, "Prepare", "templates at each rate, examples for each row, one dataset for each phase")
    for name, c in _run_and_baseline(config):
        step.prepare(c, partial(_print_line, console, name))


def train(config: RunConfig, console: Console) -> None:
    from pi_ray.report.loss_plot import draw_after_phases

    if hosted.is_hosted(config):
        return _tune(config, console)
    where = f"{config.train.workers} worker(s), {config.train.backend.name}"
    _begin(config, console, "Train", f"LoRA rank {config.train.lora.rank} through the phases, {where}")
    for name, c in _run_and_baseline(config):
        if launch.is_trained(c):
            _print_line(console, name, "nothing to do, every phase has its adapter")
            if c.schedule.floor:
                _print_line(console, name, str(decide_floor(c)))
            continue
        costs = tokens_of_updates(c)
        with ProgressLine(console, f"  {name or 'promptintern: '}update", len(costs)) as watch:
            launch.train(c, draw_after_phases(c, training_listener(watch, costs)))


def _tune(config: RunConfig, console: Console) -> None:
    where = config.closed.base_url or "OpenAI"
    _begin(config, console, "Train", f"{config.closed.model} through the phases, one fine-tuning job each, on {where}")
    for name, c in _run_and_baseline(config):
        tell = partial(_print_line, console, name)
        model = hosted.tune(c, tell, hosted.ask_on_terminal, ("plain",) if name else COLUMNS)
        tell(model)


def evaluate(config: RunConfig, console: Console, columns: Sequence[Column] = ()) -> dict[str, Any]:
    """The summary, which is also printed unless single `columns` were asked for."""
    from pi_ray.evaluate.columns import columns_of
    from pi_ray.evaluate.evaluate import evaluate_run
    from pi_ray.report.summary import summary_table

    _begin(config, console, "Evaluate", f"{config.evaluate.split} rows, temperature 0")
    config = answered_config(config)
    asked = columns or columns_of(config)
    rows = len(RunDir(config.root).read_rows(config.evaluate.split))
    counts: dict[str, int] = {}
    with ProgressLine(console, "  rows", len(asked) * (rows + min(rows, config.evaluate.latency_rows))) as watch:

        def listen(column: str, done: int, total: int) -> None:
            counts[column] = done
            watch.update(sum(counts.values()), column)

        summary = evaluate_run(config, listen, asked)
    if not columns:
        console.print(summary_table(summary))
    return summary


def report(config: RunConfig, console: Console) -> Path:
    from pi_ray.report.page import write_report

    path = write_report(RunDir(config.root), answered_config(config))
    console.print(f"[bold]Report[/]  {shortest_path(path)}", highlight=False)
    return path


def publish(config: RunConfig, console: Console, name: str = "") -> Path:
    folder = publish_adapter(RunDir(config.root), answered_config(config), name)
    url = f"{config.store.rstrip('/')}/{folder.parent.name}/{folder.name}"
    console.print(f"[bold]Published[/]  {url if '://' in config.store else shortest_path(folder)}", highlight=False)
    return folder


def shortest_path(path: Path) -> Path:
    """`path` as it is shown: relative where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _begin(config: RunConfig, console: Console, step: str, text: str) -> None:
    """Print the step, and keep the configuration in the run directory. Who needs Ray joins it: a step that is done does
    not.
    """
    console.print(f"[bold]{step}[/]  {text}", highlight=False)
    path = RunDir(config.root).config
    content = dump_config(config.replace(**{"closed.confirmed": False}))  # a yes to spending is for one command
    if not path.exists() or path.read_text() != content:
        write_atomic(path, content)


def _print_line(console: Console, name: str, line: str | dict[str, Any]) -> None:
    """Print a line of a step, or an event of tuning, after the name of its run."""
    text = line if isinstance(line, str) else f"phase {line['phase']}: {line['message']}"
    console.print(f"  {name}{text}", highlight=False)


def _run_and_baseline(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """(prefix of its lines, config) of the run, and of plain fine-tuning, which is a schedule and not code."""
    config = answered_config(config)
    return [("", config), *([("plain: ", plain_finetuning_config(config))] if config.evaluate.baseline else [])]
