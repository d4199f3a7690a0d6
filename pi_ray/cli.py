"""The `pi-ray` command: thin verbs over the library. What a verb needs is imported inside it, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray import __version__, config, runfile
from pi_ray.errors import ConfigError, PiRayError

if TYPE_CHECKING:
    from rich.console import Console

Argument = Callable[[argparse.ArgumentParser], object]
VERBS: dict[str, tuple[str, tuple[Argument, ...], Callable[[argparse.Namespace, Console], None]]] = {}


def verb(help: str, *arguments: Argument) -> Callable:
    """Make a function `pi-ray <its name>`, with these arguments."""

    def register(function: Callable) -> Callable:
        VERBS[function.__name__] = (help, arguments, function)
        return function

    return register


def argument(*names: str, **options: Any) -> Argument:
    return lambda parser: parser.add_argument(*names, **options)


RUN = argument("config", type=Path, metavar="run.yaml", help="a run file, or a run directory")
OVERRIDES = argument("overrides", nargs="*", metavar="section.key=value", help="overrides, such as train.lr=0.0003")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or that of the error, which is printed in one sentence."""
    args = _arguments(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    try:
        VERBS[args.verb][2](args, console)
    except PiRayError as error:
        print(f"pi-ray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pi-ray: interrupted; the same command goes on from what is done", file=sys.stderr)
        return 130
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. Overrides may also stand behind an option, where argparse does not look for them."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pi-ray", description="Long recurrent prompts become LoRA adapters, so that inference sends the query alone.")
    parser.add_argument("--version", action="version", version=f"pi-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (help, arguments, _) in VERBS.items():
        sub = verbs.add_parser(name, help=help, description=help)
        for add in arguments:
            add(sub)
    return parser


def _load(args: argparse.Namespace) -> config.RunConfig:
    path = args.config / "run.yaml" if args.config.is_dir() else args.config
    return runfile.load(path, args.overrides)


@verb("the bundled task on the bundled model: prepare, train, evaluate, report, publish", OVERRIDES)
def demo(args: argparse.Namespace, console: Console) -> None:
    text = files("pi_ray").joinpath("demo.yaml").read_text(encoding="utf-8")
    _run(runfile.parse(text, "demo.yaml", args.overrides), console)


@verb("all steps in a row: prepare, train, evaluate, report, publish; what is done already is skipped", RUN, OVERRIDES)
def run(args: argparse.Namespace, console: Console) -> None:
    _run(_load(args), console)


def _run(settings: config.RunConfig, console: Console) -> None:
    from pi_ray import pipeline
    from pi_ray.rundir import RunDir
    from pi_ray.serving.app import usage

    published = pipeline.run(settings, console)
    if not pipeline.is_served(settings):
        return
    command = "pi-ray" if shutil.which("pi-ray") else os.path.relpath(sys.argv[0])
    run_dir = os.path.relpath(settings.root) if settings.root.is_relative_to(Path.cwd()) else settings.root
    query = RunDir(settings.root).read_rows("test")[0].query
    console.print(f"\n[bold]Serve it[/]\n  {command} serve {run_dir}\n\n[bold]Ask it[/], from another terminal")
    console.print(usage(settings, f"http://{settings.serve.host}:{settings.serve.port}", published.parent.name, query), markup=False)


@verb("write a folder to start from: run.yaml, template.md and rows, all commented", argument("folder", type=Path))
def init(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.scaffold import write_task

    for path in write_task(args.folder):
        console.print(f"wrote {path}", markup=False)
    console.print(f"Put your prompt into template.md and your rows into the .jsonl files, then:\n  pi-ray plan {args.folder}/run.yaml\n  pi-ray run {args.folder}/run.yaml", markup=False)


@verb("print the whole resolved configuration", RUN, OVERRIDES)
def show(args: argparse.Namespace, console: Console) -> None:
    print(config.dump(_load(args)), end="")


@verb("print the JSON Schema of run.yaml, for editors")
def schema(args: argparse.Namespace, console: Console) -> None:
    print(config.schema())


@verb("what a run will do and cost, without training: phases, tokens, updates, time, memory, break-even", RUN, OVERRIDES)
def plan(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import plan as step

    step.render(step.plan(_load(args)), console)


@verb(
    "show a template (or any text) at some rate, what is dropped struck through; compress.name=selective and other overrides as in run.yaml",
    argument("file", type=Path, metavar="FILE", help="template.md, or any text"),
    argument("--rate", type=float, default=0.3, help="share of the tokens that stays, between 0 and 1; default: %(default)s"),
    OVERRIDES,
)
def compress(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.compress.show import show as show_compressed

    if not 0 <= args.rate <= 1:
        raise ConfigError(f"--rate {args.rate:g}: give the share of the tokens that stays, between 0 and 1")
    show_compressed(args.file, args.rate, runfile.parse("name: compress", "compress", args.overrides), console)


@verb("templates at each rate, examples for each row, one dataset for each phase", RUN, OVERRIDES)
def prepare(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.prepare(_load(args), console)


@verb("fine-tune through the phases; goes on from the newest checkpoint", RUN, OVERRIDES)
def train(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.train(_load(args), console)


@verb("compare base, full prompt, plain fine-tuning and PromptIntern on the test rows", RUN, OVERRIDES)
def evaluate(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.evaluate(_load(args), console)


@verb("write report.html of an evaluated run", RUN, OVERRIDES)
def report(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.report(_load(args), console)


@verb("run a table of runs, such as jobs/paper/table4.yaml, and print it in the paper's layout; goes on where it was stopped", RUN, OVERRIDES)
def table(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import family, pipeline

    pipeline.table(family.load(args.config, args.overrides), console, f"pi-ray table {' '.join([str(args.config), *args.overrides])}")


@verb("put the best adapter into the store, versioned and hashed", RUN, OVERRIDES, argument("--name", default="", help="the adapter's name in the store; default: the run's name"))
def publish(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import pipeline

    pipeline.publish(_load(args), console, args.name)


@verb("serve the store's adapters behind an OpenAI-compatible API", RUN, OVERRIDES)
def serve(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.serving import app

    app.run(_load(args))


if __name__ == "__main__":
    sys.exit(main())
