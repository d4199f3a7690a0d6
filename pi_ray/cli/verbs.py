"""What a verb is: a function that `pi-ray <its name>` calls, with its help and its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray import config
from pi_ray.config import run_file

if TYPE_CHECKING:
    from rich.console import Console

Argument = Callable[[argparse.ArgumentParser], object]


class Verbs(dict[str, tuple[str, tuple[Argument, ...], Callable[[argparse.Namespace, "Console"], None]]]):
    """Name -> (help, arguments, function) of a module's verbs, in the order in which they stand there."""

    def __call__(self, help: str, *arguments: Argument) -> Callable:
        """Make the decorated function `pi-ray <its name>`, with these arguments."""

        def register(function: Callable) -> Callable:
            self[function.__name__] = (help, arguments, function)
            return function

        return register


def argument(*names: str, **options: Any) -> Argument:
    return lambda parser: parser.add_argument(*names, **options)


RUN = argument("config", type=Path, metavar="run.yaml", help="a run file, or a run directory")
OVERRIDES = argument("overrides", nargs="*", default=[], metavar="section.key=value", help="overrides, such as train.lr=0.0003")


def load_config(args: argparse.Namespace) -> config.RunConfig:
    """The run that RUN and OVERRIDES name. Raises ConfigError for what is wrong with it."""
    path = args.config / "run.yaml" if args.config.is_dir() else args.config
    return run_file.load_run_file(path, args.overrides)


def folder_of(args: argparse.Namespace) -> Path:
    """The folder with the run file."""
    return args.config if args.config.is_dir() else args.config.parent
