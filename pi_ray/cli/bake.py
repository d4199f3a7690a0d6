"""The verb bake: from a prompt alone to an adapter, with queries and answers that models write."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.cli.run import run_and_tell
from pi_ray.cli.verbs import OVERRIDES, argument, verb
from pi_ray.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pi_ray.config import ModelConfig, RunConfig

EPOCHS = 6  # passes over the answered queries; the teacher's distributions bear more of them than labels do
TEMPERATURE = 0.6  # of generated queries: a small base writes nonsense at 1
SETTINGS: dict[str, Any] = {
    "schedule": {"phases": 1, "shots": 0, "epochs": EPOCHS},
    "train": {"objective": "distill", "distill": {"teacher": "base"}, "workers": 1, "batch_size": 8, "lr": 0.001},
    "evaluate": {"baseline": False, "latency_rows": 4},
}


@verb(
    "turn a prompt into an adapter, without any labelled row",
    argument("prompt", type=Path, metavar="prompt.md", help="the prompt that you send with every query today"),
    OVERRIDES,
    argument("--queries", type=Path, metavar="FILE", help="queries of your own, without answers, a line "
        '{"query": ...} each; default: queries are generated from the prompt'),
    argument("--generate", action="store_true", help="beside those of --queries also generate queries"),
)
def bake(args: argparse.Namespace) -> None:
    """Turn a prompt into an adapter that answers without it, without any labelled row.

    Queries are written about every part of the prompt, or come from you. The base model (train.distill.teacher=base)
    answers them with the whole prompt before it, or a model behind an endpoint does (train.distill.teacher=endpoint,
    closed.base_url, closed.model). The adapter learns to give these answers to the query alone. It is measured on
    queries that were held out, against the base model with the whole prompt, and published.

    The same command goes on where it was stopped. The run directory is runs/NAME, NAME being that of the prompt's file;
    'pi-ray run runs/NAME' goes on as well.
    """
    from pi_ray.answer.endpoint import require_endpoint
    from pi_ray.prompt import Template

    Template.load(args.prompt)  # before anything is written, so that an empty prompt leaves nothing behind
    settings = bake_config(args.prompt, args.queries, args.generate, args.overrides)
    _refuse_another_prompt(settings)
    if settings.train.distill.teacher == "endpoint":
        require_endpoint(settings)
    run_and_tell(settings, args)


def bake_config(prompt: Path, queries: Path | None, generate: bool, overrides: Sequence[str]) -> RunConfig:
    """The run of a prompt: SETTINGS, then the overrides. Raises ConfigError for mistakes in these."""
    import yaml

    from pi_ray.config.run_file import parse_run_file
    from pi_ray.protocols import SPLITS

    if queries and not queries.is_file():
        raise ConfigError(f"--queries {queries}: no such file")
    name = re.sub(r"[^a-z0-9._-]+", "-", prompt.stem.lower()).strip("-._")[:64] or "prompt"
    asked = str(queries.resolve()) if queries else ""
    if generate or not queries:
        asked += "+generate" if queries else "generate"
    endpoint = any(override.replace(" ", "") == "train.distill.teacher=endpoint" for override in overrides)
    ask = {"writer": "endpoint"} if endpoint else {"writer": "prompt", "temperature": TEMPERATURE}
    writer = {"ask": ask} if generate or not queries else {}
    task = {"template": str(prompt.resolve()), "train": "", "dev": "", "test": "", "queries": asked}
    text = yaml.safe_dump({"name": name, "task": task, **writer, **SETTINGS})
    found = parse_run_file(text, "bake", overrides)
    for split in SPLITS:
        if (named := getattr(found.task, split)) and not Path(named).is_file():
            raise ConfigError(f"task.{split}: {named}: no such file")
    if any(override.partition("=")[0].strip() == "prompt.chat" for override in overrides):
        return found
    return found.replace(**{"prompt.chat": choose_chat(found.model)})


def choose_chat(model: ModelConfig) -> str:
    """The model's own chat template; ChatML or plain text where that adds a system prompt or there is none."""
    from pi_ray.config import PromptConfig
    from pi_ray.models import load_tokenizer
    from pi_ray.prompt import CHATML, PromptEncoder

    tokenizer = load_tokenizer(model)
    try:
        PromptEncoder(tokenizer, PromptConfig())
        return "model"
    except ModelError:
        mark = CHATML[0].split("user")[0]
        return "chatml" if mark in tokenizer.get_vocab() else "model+system" if tokenizer.chat_template else "none"


def _refuse_another_prompt(settings: RunConfig) -> None:
    """Raise ConfigError where the run directory is that of another prompt or run."""
    from pi_ray.config.run_file import load_run_file
    from pi_ray.run.directory import RunDir

    path = RunDir(settings.root).config
    if path.exists() and (other := load_run_file(path).task.template) != settings.task.template:
        raise ConfigError(f"{settings.root} is the run of another prompt, {other}; give this one a name: name=NAME")
