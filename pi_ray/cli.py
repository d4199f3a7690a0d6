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

from pi_ray import __version__, config, floors, runfile
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
OVERRIDES = argument("overrides", nargs="*", default=[], metavar="section.key=value", help="overrides, such as train.lr=0.0003")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or that of the error, which is printed in one sentence."""
    args = _arguments(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    try:
        if args.verb != "doctor":  # which says it, and more
            floors.check()
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


@verb(
    "what a run will do and cost, without training: phases, tokens, updates, time, memory, break-even",
    RUN, OVERRIDES, argument("--scale", action="store_true", help="also on 1 to 64 nodes, with up to 100 million rows: time, traffic, money, and what limits it"),
)
def plan(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import plan as step

    step.render(step.plan(_load(args)), console, scale=args.scale)


@verb(
    "whether a run can work here, or on the cluster at --address, and how to mend what is in its way; also without a run file",
    argument("config", type=Path, nargs="?", metavar="run.yaml", help="a run file, or a run directory"), OVERRIDES,
    argument("--address", default="", metavar="URL", help="of a cluster's Jobs API, such as http://127.0.0.1:8265; default: this machine"),
)
def doctor(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import doctor as visit

    if visit.render(visit.examine(_load(args) if args.config else None, args.address), console):
        sys.exit(1)


@verb(
    "write a cluster's files for a run: k8s (KubeRay), launcher (ray up on AWS or GCP), slurm; see cluster/README.md",
    argument("kind", choices=["k8s", "launcher", "slurm"]), RUN, OVERRIDES, argument("--out", type=Path, metavar="FOLDER", help="where to; default: print them"),
)
def render(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import render as files

    found, notes = files.render(args.kind, _load(args), args.config if args.config.is_dir() else args.config.parent)
    if args.out:
        for path in files.write(found, args.out):
            console.print(f"wrote {path}", markup=False)
    else:
        print("\n---\n".join(found.values()), end="")
    for line in notes:
        print(f"note: {line}", file=sys.stderr)


@verb("train again on the rows as they are now, from the newest published adapter, in a run directory of its own, and publish the next version", RUN, OVERRIDES)
def refresh(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import refresh as again

    _run(again.config_of(_load(args)), console)


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


@verb(
    "print a prepared row and the examples that it is given, with their scores",
    RUN, OVERRIDES,
    argument("--row", required=True, metavar="ID", help="the row's id"),
    argument("--split", default="", choices=("", "train", "dev", "test", "unlabelled"), help="where to look for it; default: in all of them"),
)
def neighbours(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.retrieve.show import show as show_neighbours

    show_neighbours(_load(args), args.row, args.split, console)


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


@verb(
    "which version of an adapter answers: give one to everyone, try one on a share of the requests, go back; alone it shows how things are",
    argument("name", metavar="NAME", help="the adapter"),
    argument("--version", default="", help="v0003, or latest: whichever is newest"),
    argument("--canary", default="", metavar="PERCENT", help="this share of the requests alone; default of --version: the one on trial, or the newest"),
    argument("--rollback", action="store_true", help="end the trial; without one, back to the version before"),
    argument("--alias", default="prod", help="another name for a version, asked for as NAME@ALIAS; default: %(default)s, which NAME alone means"),
    argument("--store", default="store", help="folder or URL; default: store under the current folder"),
)
def release(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import release as step
    from pi_ray.serving.adapters import AdapterStore

    store = AdapterStore(args.store)
    canary = step.percent(args.canary) if args.canary else None
    aliases = step.release(store, args.name, args.version, canary, args.rollback, args.alias)
    step.show(store, args.name, aliases, lambda line: console.print(line, markup=False))


@verb(
    "make a bearer key for the server: prints it once, and the line for serve.keys_file, in which it cannot be read",
    argument("name", metavar="NAME", help="whose key it is"),
    argument("--adapters", nargs="+", default=[], metavar="ADAPTER", help="the models it may use; default: all"),
)
def key(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.serving import keys

    made = keys.new_key()
    print(f"the key, shown this once:\n  {made}\nits line for the file that serve.keys_file names:\n  {keys.line(made, args.name, args.adapters)}")


@verb(
    "talk to an adapter on the terminal, in this process: what it answers, with tokens and milliseconds",
    argument("adapter", metavar="RUN_OR_ADAPTER", help="a run directory, or an adapter's name in the store"), OVERRIDES,
)
def chat(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.serving import chat as terminal

    terminal.chat(args.adapter, args.overrides)


ADDRESS = argument("--address", default="", metavar="URL", help="of the cluster's Jobs API; default: cluster.address of run.yaml, RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265")
JOB = argument("job", metavar="JOB", help="a job's id, or a run's name")


@verb(
    "run a run file as a job of a Ray cluster, and follow it; Ctrl-C leaves it running, the same command follows it again, or goes on where it ended",
    RUN, ADDRESS, argument("--step", default="run", choices=["run", "prepare", "train", "evaluate", "report", "publish", "serve"], help="one step of it; default: all of them"), OVERRIDES,
)
def submit(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import submit as jobs

    sys.exit(jobs.submit(args.config, args.overrides, args.step, args.address, console))


@verb("jobs of a cluster: where one stands, or all of them", argument("job", nargs="?", default="", metavar="JOB", help="a job's id, or a run's name; default: all"), ADDRESS)
def status(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import auth
    from pi_ray import submit as jobs

    jobs.status(jobs.Jobs(auth.address_of(args.address)), args.job, console)


@verb("what a job prints, until it ends; Ctrl-C leaves it running", JOB, ADDRESS)
def logs(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import auth
    from pi_ray import submit as jobs

    cluster = jobs.Jobs(auth.address_of(args.address))
    sys.exit(jobs.follow(cluster, cluster.find(args.job).submission_id, console))


@verb("end a job; what it has done is kept, and submitting its run again goes on from there", JOB, ADDRESS)
def stop(args: argparse.Namespace, console: Console) -> None:
    from pi_ray import auth
    from pi_ray import submit as jobs

    cluster = jobs.Jobs(auth.address_of(args.address))
    job = cluster.find(args.job).submission_id
    console.print(f"{job} {'is being stopped' if cluster.stop(job) else 'had ended already'}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
