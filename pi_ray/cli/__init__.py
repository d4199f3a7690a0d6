"""The `pi-ray` command: thin verbs over the library. What a verb needs is imported inside it, so that --help is instant."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from pi_ray import __version__
from pi_ray.cli import cluster, run, serve
from pi_ray.cluster import requirements
from pi_ray.errors import PiRayError

VERBS = {**run.verb, **serve.verb, **cluster.verb}  # in the order of --help


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or that of the error, which is printed in one sentence."""
    args = _arguments(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())  # no news on a machine without a GPU
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    try:
        if args.verb != "doctor":  # which says it, and more
            requirements.check_requirements()
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
