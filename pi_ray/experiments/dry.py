"""A dry run: every step of a run file on three rows and a tiny random model of the same architecture, on CPUs.

It finds what would break hours later: a column without data, a key that one step refuses, a base whose layers training
or serving cannot handle. Answers are noise; nothing is published outside the dry run's own folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from pi_ray import hosted, pipeline
from pi_ray.config import RunConfig
from pi_ray.errors import ConfigError
from pi_ray.evaluate.columns import trained_column, untrained_column
from pi_ray.experiments.sweep import Sweep
from pi_ray.experiments.table import read_summary
from pi_ray.models import load_model_config, load_tokenizer
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases

ROWS, SHOTS, WORKERS = 3, 2, 2
SMALL = {  # settings of a model's config, where it has them
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2,
}
NEEDS_OTHERS = {"llmlingua2", "generation"}  # compressors that need an encoder of the hub, or a service


def dry_run(config: RunConfig, console: Console) -> None:
    """Run all steps of a run file. Raises what a step raises."""
    with dry_config(config) as dry:
        _tell(config, dry, console)
        pipeline.run(dry, console)
    console.print("[bold]Dry run[/]  every step works")


def dry_table(sweep: Sweep, console: Console) -> None:
    """Prepare, train and evaluate each column once. Raises what a step raises."""
    runs = [run for run in sweep.runs if run.seed == sweep.config.seeds[0]]
    for i, run in enumerate(runs, start=1):
        console.rule(f"{i} of {len(runs)}: {run.column}, dry", align="left")
        with dry_config(run.config) as dry:
            _tell(run.config, dry, console)
            pipeline.prepare(dry, console)
            if run.trained:
                pipeline.train(dry, console)
            column = trained_column(dry) if run.trained else untrained_column(dry)
            pipeline.evaluate(dry, console, [column])
            read_summary(RunDir(dry.root), run.trained, sweep.metric)
    console.print(f"[bold]Dry run[/]  every step of {len(runs)} columns works")


def _tell(config: RunConfig, dry: RunConfig, console: Console) -> None:
    what = f"{ROWS} rows of each split, a tiny random model like {config.model.base}, {dry.train.workers} CPU worker(s)"
    other = f", {dry.compress.name} in place of {config.compress.name}" * (dry.compress.name != config.compress.name)
    console.print(f"[bold]Dry run[/]  {what}{other}", highlight=False)


@contextmanager
def dry_config(config: RunConfig) -> Iterator[RunConfig]:
    """The run in small, in a temporary folder of its own. Raises ConfigError for a model of a service."""
    if hosted.is_hosted(config):
        raise ConfigError("a dry run needs a model whose weights are here; train.backend.name openai would cost money")
    if config.answers_first:
        raise ConfigError("a dry run needs labelled rows: its random model answers no query, and an endpoint costs")
    with TemporaryDirectory(prefix="pi-ray-dry-") as folder:
        tiny = str(Path(folder) / "model")
        _write_tiny_model(config, Path(tiny))
        phases = [{"rate": p.rate, "shots": min(p.shots, SHOTS), "epochs": 1} for p in plan_phases(config.schedule)]
        compressor = config.compress.name if config.compress.name not in NEEDS_OTHERS else "selective"
        workers = min(config.train.workers, WORKERS)
        yield config.replace(run_dir=f"{folder}/run", store=f"{folder}/store", **{
            "model.base": tiny, "model.revision": "", "model.dtype": "float32", "model.quantize": "",
            "task.rows": dict.fromkeys(("train", "dev", "test", "unlabelled"), ROWS), "task.overlap": "drop",
            "schedule": {"name": "list", "list": phases, "floor": config.schedule.floor},
            "compress": {**config.compress.model_dump(mode="json"), "name": compressor, "model": tiny},
            "train.workers": workers, "train.min_workers": 0, "train.batch_size": 2 * workers, "train.micro_batch": 0,
            "train.gpu": False, "train.attention": "auto", "train.early_stop": 0, "train.dev_every": 0,
            "train.tracker": "", "evaluate.latency_rows": 1, "evaluate.bootstrap": 50,
            "evaluate.shots": min(config.evaluate.shots, SHOTS), "evaluate.max_new_tokens": 8,
            "cluster": {}, "closed.confirmed": False,
        })


def _write_tiny_model(config: RunConfig, folder: Path) -> None:
    """A random model of the base's architecture with its tokenizer. Raises ConfigError where none can be made."""
    from transformers import AutoModelForCausalLM

    shape, tokenizer = load_model_config(config.model), load_tokenizer(config.model)
    text = shape.get_text_config()
    grouped = getattr(text, "num_key_value_heads", None) != getattr(text, "num_attention_heads", None)
    small: dict[str, Any] = {**SMALL, "num_key_value_heads": 2 if grouped else SMALL["num_attention_heads"]}
    for name, value in small.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    if layers := getattr(text, "layer_types", None):
        text.layer_types = [*dict.fromkeys(layers)][: text.num_hidden_layers] * text.num_hidden_layers
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    try:
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    except (ValueError, RuntimeError, TypeError) as error:
        why = inspect.cleandoc(str(error)).splitlines()[0]
        cure = "set model.base to a small one"
        raise ConfigError(f"no tiny model like {config.model.base} can be made ({why}); {cure}") from error
    tokenizer.save_pretrained(folder)
