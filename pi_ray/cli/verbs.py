"""Verbs: functions that `pi-ray <name>` calls, each with one line of help, a longer description and its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pi_ray.config import RunConfig

Argument = Callable[[argparse.ArgumentParser], object]
Function = Callable[[argparse.Namespace], None]  # of the parsed arguments, and `args.console` to print on


class Verb(NamedTuple):
    """A verb. Its function's docstring, where there is one, is the description that `pi-ray <name> --help` prints."""

    help: str
    arguments: tuple[Argument, ...]
    function: Function


VERBS: dict[str, Verb] = {}


def verb(help: str, *arguments: Argument) -> Callable[[Function], Function]:
    """Make a function the verb of its name."""

    def register(function: Function) -> Function:
        VERBS[function.__name__] = Verb(help, arguments, function)
        return function

    return register


def argument(*names: str, **options: Any) -> Argument:
    """An argument as argparse's add_argument takes it."""
    return lambda parser: parser.add_argument(*names, **options)


RUN = argument("config", type=Path, metavar="run.yaml", help="a run file, or a run directory")
OVERRIDES = argument(
    "overrides", nargs="*", default=[], metavar="section.key=value", help="keys to override, such as train.lr=0.0003"
)


def load_config(args: argparse.Namespace) -> RunConfig:
    """The run that RUN and OVERRIDES name. Raises ConfigError for mistakes in it."""
    from pi_ray.config.run_file import load_run_file

    return load_run_file(run_file_of(args), args.overrides)


def run_file_of(args: argparse.Namespace) -> Path:
    return args.config / "run.yaml" if args.config.is_dir() else args.config
