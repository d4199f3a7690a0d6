"""Verbs of what is published: serving it, which version answers, who may ask."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pi_ray.cli.verbs import OVERRIDES, RUN, Verbs, argument, load_config

if TYPE_CHECKING:
    from rich.console import Console

verb = Verbs()


@verb("serve the store's adapters behind an OpenAI-compatible API", RUN, OVERRIDES)
def serve(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.serve import app

    app.run_server(load_config(args))


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
    from pi_ray.store import release as step
    from pi_ray.store.adapters import AdapterStore

    store = AdapterStore(args.store)
    canary = step.parse_percent(args.canary) if args.canary else None
    aliases = step.release_version(store, args.name, args.version, canary, args.rollback, args.alias)
    step.print_aliases(store, args.name, aliases, lambda line: console.print(line, markup=False))


@verb(
    "make a bearer key for the server: prints it once, and the line for serve.keys_file, in which it cannot be read",
    argument("name", metavar="NAME", help="whose key it is"),
    argument("--adapters", nargs="+", default=[], metavar="ADAPTER", help="the models it may use; default: all"),
)
def key(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.serve.http import keys

    made = keys.new_key()
    print(f"the key, shown this once:\n  {made}\nits line for the file that serve.keys_file names:\n  {keys.keys_file_line(made, args.name, args.adapters)}")


@verb(
    "talk to an adapter on the terminal, in this process: what it answers, with tokens and milliseconds",
    argument("adapter", metavar="RUN_OR_ADAPTER", help="a run directory, or an adapter's name in the store"), OVERRIDES,
)
def chat(args: argparse.Namespace, console: Console) -> None:
    from pi_ray.serve import chat as terminal

    terminal.chat(args.adapter, args.overrides)
