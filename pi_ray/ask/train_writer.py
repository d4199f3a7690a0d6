"""The adapter that writes queries: pi-ray's own training, on pairs of units that a labelled row needs and its query."""

from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

import pyarrow as pa

from pi_ray.ask.needs import TAUGHT
from pi_ray.ask.requests import adapter_prompt
from pi_ray.config import RunConfig
from pi_ray.data.phase_dataset import SCHEMA, publish_phase
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row
from pi_ray.run.artifact import digest, is_current, temporary_path
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learning_settings
from pi_ray.run.row_store import write_piece
from pi_ray.train import launch
from pi_ray.units import Unit

BATCH_ROWS = 16  # rows of one update, or a few more, so that each worker has as many
PAIRS = 4096  # labelled rows that are learned from at most
DEV_SHARE, DEV_ROWS = 10, 32  # one of so many rows, at most so many, only tells how well the others are learned

Pair = tuple[str, str]  # prompt, query


def writer_config(config: RunConfig) -> RunConfig:
    """The run that trains the adapter: the run's base, workers and LoRA; one phase, without a template."""
    workers, updates = config.train.workers, config.ask.updates
    return config.replace(**{
        "run_dir": str(RunDir(config.root).writer().root), "task.generate": False, "ask": {},
        "prompt": prompt_format(config),
        "schedule": {"name": "list", "list": [{"rate": 0.0, "shots": 0, "steps": updates}]},
        "train.objective": "sft", "train.lr": config.ask.lr, "train.batch_size": -(-BATCH_ROWS // workers) * workers,
        "train.micro_batch": 0, "train.gist": 0, "train.init_adapter": "", "train.dev_every": 0, "train.early_stop": 0,
        "train.tracker": "",
    })


def prompt_format(config: RunConfig) -> dict[str, Any]:
    """The `prompt` block of the adapter that writes: the run's chat format around the prompt as it is."""
    return {"chat": config.prompt.chat, "query": "{query}"}


def writer_pairs(rows: Sequence[Row], needed: Sequence[Sequence[int]], units: Sequence[Unit]) -> list[Pair]:
    """Pairs that the adapter learns from: each of a row's two most telling units, and both, with the row's query."""
    pairs = []
    for row, places in zip(rows, needed, strict=True):
        one, other = places[:1], places[1:TAUGHT]
        for chosen in (one, other, [*one, *other]) if other else (one,) if one else ():
            pairs.append((adapter_prompt(units[place] for place in chosen), row.query))
    return pairs


def taught_sections(needed: Sequence[Sequence[int]], units: Sequence[Unit]) -> set[str]:
    """The sections of the units in `writer_pairs`."""
    return {units[place].section for places in needed for place in places[:TAUGHT]}


def train_writer(
    config: RunConfig, pairs: Sequence[Pair], watch: Callable[[dict[str, Any]], None] = lambda entry: None
) -> Path:
    """The folder of the trained adapter, in <run_dir>/writer. Training goes on where it was stopped.

    The caller has joined the cluster. Raises what training raises.
    """
    writing = writer_config(config)
    run, pairs = RunDir(writing.root), pairs[:: max(1, len(pairs) // PAIRS)]
    fingerprint = digest([pairs, learning_settings(writing)])
    if not is_current(run.phase("dev"), fingerprint):  # which is written last
        rmtree(run.root, ignore_errors=True)  # of other pairs or settings
        held = set(range(0, len(pairs), DEV_SHARE)[:DEV_ROWS]) if len(pairs) > DEV_SHARE else set()
        learned = [pair for i, pair in enumerate(pairs) if i not in held]
        encoder = PromptEncoder(load_tokenizer(config.model), writing.prompt)
        _write_dataset(run.phase("0"), learned, encoder, fingerprint)
        _write_dataset(run.phase("dev"), [pairs[i] for i in sorted(held)] or learned, encoder, fingerprint)
    launch.train(writing, watch)
    return run.adapter(0)


def _write_dataset(final: Path, pairs: Sequence[Pair], encoder: PromptEncoder, fingerprint: str) -> None:
    """Write one dataset of training, as preparation does for a phase without template and examples."""
    folder = temporary_path(final)
    columns = {
        "id": [str(i) for i in range(len(pairs))], "prompt_ids": [encoder.row(prompt) for prompt, _ in pairs],
        "label_ids": [encoder.answer(query) for _, query in pairs], "left_out": [0] * len(pairs),
    }
    try:
        folder.mkdir(parents=True)
        write_piece(folder / "part-00000.parquet", pa.table(columns, schema=SCHEMA))
        phase = {"rate": 0.0, "shots": 0}
        publish_phase(folder, final, encoder.prefix(""), fingerprint=fingerprint, template="", phase=phase)
    finally:
        rmtree(folder, ignore_errors=True)
