"""Verbs of runs: their files, their steps, and what they would do."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from pi_ray import config
from pi_ray.cli.verbs import OVERRIDES, RUN, Verbs, argument, load_config
from pi_ray.config import run_file
from pi_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

verb = Verbs()


@verb("the bundled task on the bundled model: prepare, train, evaluate, report, publish", OVERRIDES)
def demo(args: argparse.Namespace, console: Console) -> None:
    text = files("pi_ray.cli").joinpath("demo.yaml").read_text(encoding="utf-8")
    _run(run_file.parse_run_file(text, "demo.yaml", args.overrides), console)


@verb("all steps in a row: prepare, train, evaluate, report, publish; what is done already is skipped", RUN, OVERRIDES)
def run(args: argparse.Namespace, console: Console) -> None:
    _run(load_config(args), console)


def _run(settings: config.RunConfig, console: Console) -> None:
    from pi_ray import pipeline
    from pi_ray.run.directory import RunDir
    from pi_ray.serve.app import usage_text

    published = pipeline.run(settings, console)
    if not pipeline.is_served(settings):
        return
    command = "pi-ray" if shutil.which("pi-ray") else os.path.relpath(sys.argv[0])
    run_dir = os.path.relpath(settings.root) if settings.root.is_relative_to(Path.cwd()) else settings.root
    query = RunDir(settings.root).read_rows("test")[0].query
    console.print(f"\n[bold]Serve it[/]\n  {command} serve {run_dir}\n\n[bold]Ask it[/], from another terminal")
    console.print(usage_text(settings, f"http://{settings.serve.host}:{settings.serve.port}", published.parent.name, query), markup=False)


@verb("write a folder to start from: run.yaml, template.md and rows, all commented", argument("folder", type=Path))
def init(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.cli.init import write_task

    for path in write_task(args.folder):
        console.print(f"wrote {path}", markup=False)
    console.print(f"Put your prompt into template.md and your rows into the .jsonl files, then:\n  pi-ray plan {args.folder}/run.yaml\n  pi-ray run {args.folder}/run.yaml", markup=False)


@verb("print the whole resolved configuration", RUN, OVERRIDES)
def show(args: argparse.Namespace, console: Console) -> None:
    print(config.dump_config(load_config(args)), end="")


@verb("print the JSON Schema of run.yaml, for editors")
def schema(args: argparse.Namespace, console: Console) -> None:
    print(config.json_schema())


@verb(
    "what a run will do and cost, without training: phases, tokens, updates, time, memory, break-even",
    RUN, OVERRIDES, argument("--scale", action="store_true", help="also on 1 to 64 nodes, with up to 100 million rows: time, traffic, money, and what limits it"),
)
def plan(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.plan import plan as step

    step.print_plan(step.plan_run(load_config(args)), console, scale=args.scale)


@verb("train again on the rows as they are now, from the newest published adapter, in a run directory of its own, and publish the next version", RUN, OVERRIDES)
def refresh(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.store import refresh as again

    settings = again.refresh_config(load_config(args))
    again.copy_start_adapter(settings)
    _run(settings, console)
    again.mark_published(settings)


@verb(
    "show a template (or any text) at some rate, what is dropped struck through; compress.name=selective and other overrides as in run.yaml",
    argument("file", type=Path, metavar="FILE", help="template.md, or any text"),
    argument("--rate", type=float, default=0.3, help="share of the tokens that stays, between 0 and 1; default: %(default)s"),
    OVERRIDES,
)
def compress(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.compress.display import show_compression as show_compressed

    if not 0 <= args.rate <= 1:
        raise ConfigError(f"--rate {args.rate:g}: give the share of the tokens that stays, between 0 and 1")
    show_compressed(args.file, args.rate, run_file.parse_run_file("name: compress", "compress", args.overrides), console)


@verb("templates at each rate, examples for each row, one dataset for each phase", RUN, OVERRIDES)
def prepare(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.prepare(load_config(args), console)


@verb(
    "print a prepared row and the examples that it is given, with their scores",
    RUN, OVERRIDES,
    argument("--row", required=True, metavar="ID", help="the row's id"),
    argument("--split", default="", choices=("", "train", "dev", "test", "unlabelled"), help="where to look for it; default: in all of them"),
)
def neighbours(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.data.show_neighbours import show_neighbours

    show_neighbours(load_config(args), args.row, args.split, console)


@verb("fine-tune through the phases; goes on from the newest checkpoint", RUN, OVERRIDES)
def train(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.train(load_config(args), console)


@verb("compare base, full prompt, plain fine-tuning and PromptIntern on the test rows", RUN, OVERRIDES)
def evaluate(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.evaluate(load_config(args), console)


@verb("write report.html of an evaluated run", RUN, OVERRIDES)
def report(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.report(load_config(args), console)


@verb("run a table of runs, such as jobs/paper/table4.yaml, and print it in the paper's layout; goes on where it was stopped", RUN, OVERRIDES)
def table(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.experiments.run_table import run_table
    from pi_ray.experiments.sweep import load_sweep

    command = f"pi-ray table {' '.join([str(args.config), *args.overrides])}"
    run_table(load_sweep(args.config, args.overrides), console, command)


@verb("put the best adapter into the store, versioned and hashed", RUN, OVERRIDES, argument("--name", default="", help="the adapter's name in the store; default: the run's name"))
def publish(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.publish(load_config(args), console, args.name)
