"""The verb init: a commented task in a new folder, a sample to fill in or made of a request log."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from pi_ray.cli.verbs import argument, verb
from pi_ray.errors import ConfigError


@verb(
    "write a commented task to fill in: run.yaml, template.md, rows; or make one of a request log",
    argument("folder", type=Path),
    argument("--from", dest="log", type=Path, metavar="requests.jsonl", help="a log of requests to OpenAI's API, of "
        "which template, tools and rows are made"),
)
def init(args: argparse.Namespace) -> None:
    """Write a commented task into a folder: run.yaml, template.md and rows, to fill in.

    With --from they are made of a log of requests to OpenAI's API: JSON Lines, or one .json array, of {"messages",
    "tools"}, with the response beside it, or of {"request", "response"}. What all requests have in common becomes
    template.md and tools.json; the rest becomes train.jsonl, dev.jsonl and test.jsonl, and queries.jsonl where there is
    no answer.
    """
    if args.log:
        from pi_ray.request_log import summary, task

        require_new_files(args.folder, task.FILES)
        made = task.write_logged_task(args.log, args.folder)
        written, told = made.files, summary.describe_logged_task(made, args.log)
        cure = "Read template.md and some of the rows, then:"
    else:
        written, told = write_task(args.folder), iter(())
        cure = "Put your prompt into template.md and your rows into the .jsonl files, then:"
    for line in (*(f"wrote {path}" for path in written), *told, cure):
        args.console.print(line, markup=False)
    args.console.print(f"  pi-ray plan {args.folder}/run.yaml\n  pi-ray run {args.folder}/run.yaml", markup=False)


def write_task(folder: Path) -> list[Path]:
    """Copy the small task of new_task/, which runs as it is, into `folder`, and return the paths of its files.

    Raises ConfigError, and writes nothing, if one of them is already there.
    """
    from pi_ray.run.artifact import write_atomic

    task = files("pi_ray.cli") / "new_task"
    contents = {file.name: file.read_text(encoding="utf-8") for file in task.iterdir() if file.is_file()}
    require_new_files(folder, contents)
    return [write_atomic(folder / name, text) for name, text in contents.items()]


def require_new_files(folder: Path, names: Iterable[str]) -> None:
    """Raises ConfigError if a file of these names is already in `folder`, or if that is a file itself."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; give the name of a new or empty one")
    if existing := ", ".join(sorted(name for name in names if (folder / name).exists())):
        raise ConfigError(f"{folder}: {existing} already there, nothing was overwritten; give the name of a new folder")
