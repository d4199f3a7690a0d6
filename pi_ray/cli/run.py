"""Verbs of runs: demo, a whole run, its single steps, and looks inside."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from pi_ray.cli.verbs import OVERRIDES, RUN, VERBS, Verb, argument, load_config, run_file_of, verb
from pi_ray.errors import ConfigError
from pi_ray.protocols import SPLITS, UNLABELLED

if TYPE_CHECKING:
    from pi_ray.config import RunConfig


MODEL = argument("--model", default="", metavar="BASE", help="another base than smollm2-135m, as model.base takes it; "
    "gemma3-270m is carried by a package too")


@verb("train, evaluate and publish an adapter on a bundled task and model", MODEL, OVERRIDES)
def demo(args: argparse.Namespace) -> None:
    """Run all steps on a bundled task and model: prepare, train, evaluate, report, publish.

    The task is opsql: requests in English become alerts in an in-house query language that only the prompt explains.
    Nothing is downloaded from a hub. Run it again, and it goes on where it was stopped. The run directory is runs/demo;
    open runs/demo/report.html afterwards.
    """
    from pi_ray.config.run_file import parse_run_file

    text = files("pi_ray.cli").joinpath("demo.yaml").read_text(encoding="utf-8")
    overrides = [*([f"model.base={args.model}"] if args.model else []), *args.overrides]
    run_and_tell(parse_run_file(text, "demo.yaml", overrides), args)


DRY = argument("--dry", action="store_true", help="every step on 3 rows and a tiny random model of the same "
    "architecture, on CPUs, in a temporary folder: what would break later breaks now")


@verb("all steps in a row; steps that are done are skipped", RUN, DRY, OVERRIDES)
def run(args: argparse.Namespace) -> None:
    """Prepare, train, evaluate, report and publish. Steps that are done are skipped, and a stopped one goes on."""
    from pi_ray.experiments.dry import dry_run

    if args.dry:
        dry_run(load_config(args), args.console)
    else:
        run_and_tell(load_config(args), args)


def run_and_tell(settings: RunConfig, args: argparse.Namespace) -> None:
    """Do all steps, then print how to serve the adapter and how to ask it."""
    from pi_ray import pipeline
    from pi_ray.run.directory import RunDir

    published = pipeline.run(settings, args.console)
    if not pipeline.is_served(settings):
        return
    from pi_ray.serve.app import usage_text

    command = "pi-ray" if shutil.which("pi-ray") else os.path.relpath(sys.argv[0])
    run_dir, query = pipeline.shortest_path(settings.root), RunDir(settings.root).read_rows("test")[0].query
    args.console.print(f"\n[bold]Serve it[/]\n  {command} serve {run_dir}\n\n[bold]Ask it[/], from another terminal")
    args.console.print(usage_text(settings, published.parent.name, query), markup=False)


@verb("print all keys of a run as it has them", RUN, OVERRIDES)
def show(args: argparse.Namespace) -> None:
    from pi_ray.config import dump_config

    print(dump_config(load_config(args)), end="")


@verb("print the JSON Schema of run files, for editors")
def schema(args: argparse.Namespace) -> None:
    from pi_ray.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@verb(
    "estimate phases, tokens, time, memory and cost, without training",
    RUN, OVERRIDES,
    argument("--scale", action="store_true", help="also time, traffic, cost and bottleneck on 1 to 64 nodes, "
        "with up to 100 million rows"),
)
def plan(args: argparse.Namespace) -> None:
    """Print what a run will do, take and save; of a table file, what each column takes on one node and on two."""
    from pi_ray.experiments.plan_table import print_table_plan
    from pi_ray.experiments.sweep import is_table, load_sweep
    from pi_ray.plan import plan as step

    if is_table(run_file_of(args)):
        print_table_plan(load_sweep(args.config, args.overrides), args.console)
        return
    step.print_plan(step.plan_run(load_config(args)), args.console, scale=args.scale)


@verb("train the published adapter on rows and prompt as they are now, publish the result", RUN, OVERRIDES)
def refresh(args: argparse.Namespace) -> None:
    """Train again on the rows and the prompt as they are now, starting from the newest published adapter.

    Where the template has changed, its changed units are shown, and the published run's teacher reads the new one: the
    rows and queries about the change are learned, with others as an anchor, in few updates. The run has a run directory
    of its own; its adapter is published as the next version.
    """
    from pi_ray.store import refresh as store
    from pi_ray.store.follow_prompt import follow_prompt

    first = load_config(args)
    settings = store.refresh_config(first)
    store.copy_start_adapter(settings)
    tell = partial(args.console.print, markup=False)
    run_and_tell(follow_prompt(settings, first.root, tell), args)
    store.write_mark(settings, published=True)


@verb(
    "show a template at some rate, with the dropped words struck through",
    argument("file", type=Path, metavar="FILE", help="template.md, tools.json, or any text"),
    argument("--rate", type=float, default=0.3, help="share of tokens that stay, 0 to 1; default: %(default)s"),
    OVERRIDES,
)
def compress(args: argparse.Namespace) -> None:
    """Show a template, tools, or any text, at some rate, with the dropped words struck through.

    Overrides are keys of run files, such as compress.name=selective.
    """
    from pi_ray.compress.display import show_compression
    from pi_ray.config.run_file import parse_run_file

    if not 0 <= args.rate <= 1:
        raise ConfigError(f"--rate {args.rate:g}: give the share of the tokens that stays, between 0 and 1")
    show_compression(args.file, args.rate, parse_run_file("name: compress", "compress", args.overrides), args.console)


@verb(
    "print a prepared row with its examples and their scores",
    RUN, OVERRIDES,
    argument("--row", required=True, metavar="ID", help="the row's id"),
    argument("--split", default="", choices=("", *SPLITS, UNLABELLED), help="the row's split; default: any"),
)
def neighbours(args: argparse.Namespace) -> None:
    from pi_ray.data.show_neighbours import show_neighbours

    show_neighbours(load_config(args), args.row, args.split, args.console)


@verb("write queries about every unit of the template, and show them", RUN, OVERRIDES)
def ask(args: argparse.Namespace) -> None:
    """Write the queries that `task.queries: generate` asks for; show units, coverage, examples and what was left out.

    They are kept in the run directory, where `pi-ray run` and `pi-ray prepare` find them.
    """
    from pi_ray import pipeline
    from pi_ray.ask.show import print_queries
    from pi_ray.run.directory import RunDir

    settings = load_config(args)
    if not settings.task.generate:
        raise ConfigError("this run generates no queries; add task.queries=generate and train.objective=distill")
    print_queries(RunDir(settings.root), pipeline.ask(settings, args.console), args.console)


@verb(
    "say what an adapter knows of its prompt, unit by unit",
    argument("target", metavar="RUN_OR_ADAPTER", help="a run file or directory, or NAME[@version] of the store"),
    argument("--all", action="store_true", help="every unit, those that are known too"), OVERRIDES,
)
def knows(args: argparse.Namespace) -> None:
    """Say which facts of its prompt an adapter knows, and which to ask about again.

    The evaluation asked it about each unit of the prompt, by queries that training held out and by dev rows.
    """
    from pi_ray.report.knowledge import print_knowledge
    from pi_ray.store.find_knowledge import find_knowledge

    print_knowledge(find_knowledge(args.target, args.overrides), args.console, args.all)


def step(args: argparse.Namespace) -> None:
    from pi_ray import pipeline

    getattr(pipeline, args.verb)(load_config(args), args.console)


VERBS.update({name: Verb(help, (RUN, OVERRIDES), step) for name, help in {
    "prepare": "compress the template, retrieve examples, write a dataset for each phase",
    "train": "fine-tune through the phases; resumes from the newest checkpoint",
    "evaluate": "compare the adapter with full prompt, base model and plain fine-tuning",
    "report": "write report.html of an evaluated run",
}.items()})


@verb("run a table of runs and print it in the paper's layout", RUN, DRY, OVERRIDES)
def table(args: argparse.Namespace) -> None:
    """Run all columns and seeds of a table file, such as jobs/paper/table4.yaml, and print the table.

    A stopped table goes on. Overrides that begin with `table.` are for the table file, others for the runs.
    """
    from pi_ray.experiments.dry import dry_table
    from pi_ray.experiments.run_table import run_table
    from pi_ray.experiments.sweep import load_sweep

    sweep = load_sweep(args.config, args.overrides)
    if args.dry:
        dry_table(sweep, args.console)
    else:
        run_table(sweep, args.console, f"pi-ray table {' '.join([str(args.config), *args.overrides])}")


@verb(
    "put the best adapter into the adapter store, versioned and hashed",
    RUN, OVERRIDES, argument("--name", default="", help="the adapter's name in the store; default: the run's name"),
)
def publish(args: argparse.Namespace) -> None:
    from pi_ray import pipeline

    pipeline.publish(load_config(args), args.console, args.name)
