"""Fingerprints: hashes of the settings and inputs on which a step's output depends, so that a step knows it is done.

Preparation has one for all its outputs: a change of `retrieve` makes templates again too, from the compression cache.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pi_ray import __version__
from pi_ray.config import INPUTS, MetricConfig, RunConfig
from pi_ray.protocols import UNLABELLED
from pi_ray.run.artifact import digest, digest_file, read_manifest
from pi_ray.schedule import plan_phases

PREPARED = ("task", "model", "prompt", "compress", "retrieve")  # the blocks that preparation reads
# Keys of them that change no prepared row: they count as if at their defaults.
NOT_PREPARED = {
    "task": ("allow_code_execution", "unsafe_local_execution", "max_bad_rows"), "compress": ("api_key_env",),
}
# Keys of `train` that do not change the adapter. workers and micro_batch only spread the rows of an update, which
# changes rounding alone, and with dropout which random numbers a row meets: a run may go on with others.
NOT_LEARNED = {
    "max_failures", "keep_checkpoints", "checkpoint_every", "collective_timeout_s", "tracker", "attention", "workers",
    "min_workers", "resize_every_s", "micro_batch",
}


def wants_unlabelled(config: RunConfig) -> bool:
    """Whether a teacher answers queries that have no answer while the run trains. An endpoint answers before."""
    return config.train.objective != "sft" and config.train.distill.teacher != "endpoint"


def prepare_fingerprint(config: RunConfig, task: str, queries: str = "", base: str = "") -> str:
    """The fingerprint of the prepared rows; `task` is that of the task's rows and template, `queries` the hash of the
    generated queries, `base` that of the files of models (`preparation_digest`).

    Examples that the evaluation alone asks for do not count: neighbours.json says how many there are.
    """
    phases = [(p.rate, p.shots) for p in plan_phases(config.schedule)]
    shots = max(shots for _, shots in phases)
    parts = [__version__, task, _dump(config, *PREPARED), phases, shots, *filter(None, [base])]
    parts += [_dump(config, "ask"), queries] if config.task.generate else []
    return digest([*parts, UNLABELLED] if wants_unlabelled(config) else parts)


def ask_fingerprint(config: RunConfig, sources: str, base: str, learned: Mapping[str, Any]) -> str:
    """The fingerprint of generated queries; `sources` is that of the template and of all queries that are known, `base`
    the hash of the base model's files, `learned` the settings by which an adapter that writes is trained.
    """
    service = [config.closed.base_url, config.closed.model] if config.ask.writer == "endpoint" else []
    return digest([__version__, sources, _dump(config, "model", "prompt", "ask"), dict(learned), service, base])


def train_fingerprint(config: RunConfig, prepare: str, base: str = "") -> str:
    """The fingerprint of all adapters, from that of the prepared rows and the base model's present content."""
    phases = [(p.rate, p.shots, p.epochs, p.steps) for p in plan_phases(config.schedule)]
    floor = "floor" if config.schedule.floor else ""  # its value decides after training
    runs_code = "code execution" if floor and config.task.allow_code_execution else ""  # dev answers are scored by it
    return digest([prepare, _learned(config), phases, *filter(None, [base, floor, runs_code]), *_metric_marks(config)])


def evaluate_fingerprint(config: RunConfig, columns: list[tuple[str, str]]) -> str:
    """`columns` are (name, fingerprint of the adapter, or of the rows for the bare base)."""
    return digest([columns, _dump(config, "evaluate"), *metric_fingerprints(config)])


def metric_fingerprints(config: RunConfig) -> list[Any]:
    """The parts of task.metric on which the scores of an evaluation depend, and whether programs are run for them;
    nothing where it is not set and none are.
    """
    metric = config.task.metric
    judge = [config.closed.base_url, config.closed.model] if any(m.asks_service for m in metric) else []
    runs_code = ["code execution"] if config.task.allow_code_execution else []
    return [*([_metric_settings(metric), judge] if metric else []), *runs_code]


def learning_settings(config: RunConfig, base: str = "") -> dict[str, Any]:
    """Dotted key -> value of every setting on which an adapter depends, to say which of them has changed."""
    content: dict[str, Any] = {"the base model's content": base} if base else {}
    if config.training_metric and config.train.early_stop:
        content["task.metric, the first"] = training_metric_settings(config)
    return {**_flatten({**_dump(config, *PREPARED, "schedule"), "train": _learned(config)}), **content}


def _learned(config: RunConfig) -> dict[str, Any]:
    teaches = wants_unlabelled(config)
    unused = {"distill": teaches, "drills": teaches, "dev_every": bool(config.train.early_stop)}
    left_out = NOT_LEARNED | {key for key, used in unused.items() if not used}
    learned = config.train.model_dump(mode="json", exclude=left_out)
    for block, key in ((learned, "init_adapter"), (learned.get("distill", {}), "teacher_adapter")):
        if key in block:
            block[key] = _adapter_content(block[key])
    return learned


def _adapter_content(folder: str) -> str:
    """The hash of an adapter's weights, wherever its folder lies; the folder's path where none is there."""
    files = (read_manifest(Path(folder)) or {}).get("files", {})
    return files.get("adapter_model.safetensors", {}).get("sha256", folder)


def training_metric_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of the metric by which training decides; {} where it decides by none."""
    return _metric_settings([config.training_metric])[0] if config.training_metric else {}


def _metric_marks(config: RunConfig) -> list[Any]:
    """The parts of task.metric that change an adapter: that there is one, since dev answers are then kept, and with
    early stopping the metric that decides.
    """
    if not config.training_metric:
        return []
    return ["dev answers", *([training_metric_settings(config)] if config.train.early_stop else [])]


def _metric_settings(metrics: Iterable[MetricConfig]) -> list[dict[str, Any]]:
    """Metrics with the hashes of their files in place of the paths."""
    found = []
    for metric in metrics:
        content = digest_file(Path(metric.file)) if metric.file and Path(metric.file).is_file() else ""
        found.append({**metric.model_dump(mode="json", exclude={"file", "sandbox"}), "content": content})
    return found


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in _flatten(inner, f"{key}.{name}" if key else name).items()}


def _dump(config: RunConfig, *blocks: str) -> dict[str, Any]:
    """Blocks without the paths of rows and template, which may be moved: the task's fingerprint has their content.

    Nor do metrics count here, nor NOT_PREPARED: rows do not depend on them.
    """
    left_out, found = {"task": {*INPUTS, "metric"}}, dict[str, Any]()
    for name in blocks:
        block = getattr(config, name)
        defaults = {key: type(block).model_fields[key].default for key in NOT_PREPARED.get(name, ())}
        found[name] = block.model_copy(update=defaults).model_dump(mode="json", exclude=left_out.get(name))
    return found
