"""The `pi-ray` command: thin verbs over the library. A verb imports what it needs inside, so that --help is instant."""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from pi_ray import __version__
from pi_ray.cli import bake, cluster, init, run, serve  # noqa: F401 (they make the verbs)
from pi_ray.cli.verbs import VERBS
from pi_ray.cluster import requirements
from pi_ray.errors import PiRayError

GROUPS = {  # as `pi-ray --help` lists the verbs
    "try it": ("demo", "init", "bake"),
    "make an adapter": ("plan", "run", "ask", "prepare", "train", "evaluate", "report", "publish", "refresh", "table"),
    "look inside": ("show", "schema", "compress", "neighbours", "knows"),
    "serve adapters": ("serve", "chat", "release", "export", "key"),
    "work on a cluster": ("doctor", "render", "submit", "status", "logs", "stop"),
}
ON_RAY = {"demo", "bake", "run", "ask", "prepare", "train", "evaluate", "refresh", "table", "serve"}  # may start it
DESCRIPTION = """\
Turn long recurrent prompts into LoRA adapters, so that inference sends the query alone.

  pi-ray demo                    train, compare and publish an adapter on bundled data, on a laptop
  pi-ray init my-task            write a commented task of your own to fill in; then: pi-ray run my-task/run.yaml
  pi-ray bake prompt.md          you have a prompt and nothing else: make queries, answers and an adapter of it
  pi-ray VERB --help             say more about a verb
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or that of the error, which is printed in one sentence."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed says that it takes the CPU, which is no news on a machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    try:
        if args.verb != "doctor":  # doctor reports missing packages itself
            requirements.check_requirements()
        if args.verb in ON_RAY:  # before the verb imports ray, which keeps the RAY_AUTH_MODE that it finds
            from pi_ray.cluster import auth

            auth.secure_session(os.environ.get("RAY_ADDRESS", ""))
        from rich.console import Console

        args.console = Console(highlight=False, soft_wrap=True)
        VERBS[args.verb].function(args)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # as of a program that SIGPIPE ended
    except PiRayError as error:
        print(f"pi-ray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        kept = str(interrupt) or "what is done is kept"
        print(f"pi-ray: interrupted; {kept}. The same command goes on from there", file=sys.stderr)
        return 130
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Overrides may also stand behind an option, where argparse does not look for them."""
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        close = get_close_matches(argv[0], VERBS, n=1)
        parser.error(f"unknown verb '{argv[0]}'; " + (f"did you mean '{close[0]}'?" if close else "see pi-ray --help"))
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    listed = "\n".join(
        f"\n{group}:\n" + "\n".join(f"  {name:<11} {VERBS[name].help}" for name in names)
        for group, names in GROUPS.items()
    )
    parser = argparse.ArgumentParser("pi-ray", description=DESCRIPTION, epilog=listed.strip(), formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"pi-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", help="one of the verbs below")
    for name, verb in VERBS.items():
        description = inspect.getdoc(verb.function) or f"{verb.help[0].upper()}{verb.help[1:]}."
        sub = verbs.add_parser(name, description=description, formatter_class=plain)
        for add in verb.arguments:
            add(sub)
    return parser
