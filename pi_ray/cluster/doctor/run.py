"""Looks at a run: its rows, its model, and whether they fit into this machine's memory and GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from pi_ray.cluster import auth
from pi_ray.cluster.doctor.finding import Finding, fail, note, ok
from pi_ray.compress.generation import Generation
from pi_ray.config import CompressConfig, RunConfig
from pi_ray.errors import ConfigError, MissingExtraError, ModelError, PiRayError
from pi_ray.hosted.client import Service
from pi_ray.models import load_tokenizer, resolve
from pi_ray.plan import estimate
from pi_ray.protocols import Reject
from pi_ray.registry import tasks
from pi_ray.retrieve import encoders
from pi_ray.run.phases import distinct_rates, most_shots
from pi_ray.schedule import plan_phases
from pi_ray.train import trackers

GIB = 2**30
WORKER = 2**30  # bytes of a CPU worker's process besides the model
WEIGHTS = "*.safetensors"
SCORERS = ("llmlingua", "longllmlingua", "llmlingua2", "selective")  # compressors that load a model


def check_data(config: RunConfig) -> Iterator[Finding]:
    """The template and the first row of each split can be read."""
    try:
        task = tasks[config.task.name](config.task)
        template = task.template()
        first = {split: next(iter(task.rows(split)), None) for split in ("train", "test")}
    except (PiRayError, OSError) as error:
        yield fail("data", str(error), f"check the task block: paths start from the run file's folder{'; task.folder names the data of ' + config.task.name if config.task.name != 'jsonl' else ''}")
        return
    for split, row in first.items():
        if row is None or isinstance(row, Reject):
            said = f"{row.source}:{row.line}: {row.reason}" if row else f"the {split} split is empty"
            yield fail("data", said, f"mend the first row of task.{split}; each line is {{\"query\": ..., \"answer\": ...}}")
            return
    yield ok("data", f"{config.task.name}: template of {len(template.text):,} characters, first rows of train and test can be read")


def check_model(config: RunConfig) -> Iterator[Finding | estimate.ModelSize]:
    """The base model's shape, tokenizer and weights can be had; then, last, its size."""
    name = config.model.base
    try:
        size = estimate.model_size(config.model, config.train.lora)
        load_tokenizer(config.model)
        missing = _weights(name, config.model.revision)
    except (ModelError, MissingExtraError, ConfigError) as error:
        yield fail("model", str(error), "set model.base to a hub id that this machine reaches, or to a folder with config.json, tokenizer and safetensors; HF_TOKEN for models behind a licence")
        return
    if missing:
        yield fail("model", f"{name}: {missing}", "download the whole model: 'hf download " + name + "' fills the hub's cache, HF_HOME says where")
        return
    yield ok("model", f"{name}: {size.weights / 1e6:,.0f}M weights, tokenizer and weights can be read")
    yield size


def aids(config: RunConfig) -> dict[str, str]:
    """Key -> each model that preparation loads besides the base, where it does."""
    found, encoder = {check_key: own.model for check_key, own in _compressors(config).items() if own.name in SCORERS}, config.retrieve.encoder_model
    if _encodes(config) and encoder not in encoders.PACKAGED:
        found["retrieve.encoder_model"] = encoder if "/" in encoder or Path(encoder).is_dir() else f"sentence-transformers/{encoder}"  # as the package completes it
    return {check_key: name for check_key, name in found.items() if name != config.model.base}


def check_preparation(config: RunConfig, elsewhere: Sequence[str] = ()) -> Iterator[Finding]:
    """The weights of those models can be had, but for the keys whose models lie `elsewhere`."""
    for check_key, name in aids(config).items():
        if check_key in elsewhere:
            continue
        try:
            missing = _weights(name)
        except (ModelError, MissingExtraError) as error:
            missing = str(error).partition(";")[0]
        if missing:
            yield fail("model", f"{check_key}: {name}: {missing}", f"set {check_key} to a hub id that this machine reaches, or to a folder with config.json, tokenizer and safetensors")
        else:
            yield ok("model", f"{check_key}: {name}: weights can be read")


def check_extras(config: RunConfig) -> Iterator[Finding]:
    """Packages, and keys of services, that only some settings need."""
    packages = {
        "model.quantize": "bitsandbytes" if config.model.quantize else "",
        "retrieve.encoder_model": encoders.PACKAGED.get(config.retrieve.encoder_model, ("",))[0] if _encodes(config) else "",
        "train.tracker": trackers.PACKAGES.get(config.train.tracker, ""),
        "serve.engine": "vllm" if config.serve.engine == "vllm" else "",
    }
    for check_key, package in packages.items():
        if package and find_spec(package) is None:
            yield fail("extras", f"{check_key} needs the package {package}, which is not installed", f"'pip install {package.replace('_', '-')}', on every node")
    services = [partial(Generation, own) for own in _compressors(config).values() if own.name == "generation"]
    for service in [*services, *([partial(Service, config.closed)] if config.train.backend.name == "openai" else [])]:
        try:
            service()
        except (ConfigError, MissingExtraError) as error:
            yield fail("extras", str(error), "do that where pi-ray is started, and on every node")


def _compressors(config: RunConfig) -> dict[str, CompressConfig]:
    """Key of its model -> each compressor, where the schedule has something to compress."""
    own = config.compress
    found = {"compress.model": own.of_instruction, **({"compress.documents.model": own.of_documents} if own.documents else {})}
    return found if any(0 < rate < 1 for rate in distinct_rates(config)) else {}


def _encodes(config: RunConfig) -> bool:
    """Whether retrieval loads an encoder's model (with "auto", where the bank is large)."""
    asked = config.retrieve
    return bool(most_shots(config)) and asked.encoder == "sentence-transformers" and (asked.score == "embedding" or asked.method != "exact")


def _weights(name: str, revision: str = "") -> str:
    """What is wrong with where a model's weights are, or "". They are not read: on the hub, their names are asked for."""
    place = resolve(name)
    if Path(place).is_dir():
        return "" if any(Path(place).glob(WEIGHTS)) else f"no weights (*.safetensors) in {place}"
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    kept = [try_to_load_from_cache(place, file, revision=revision or None) for file in ("model.safetensors", "model.safetensors.index.json")]
    if any(isinstance(found, str) for found in kept):
        return ""
    try:
        files = HfApi().list_repo_files(place, revision=revision or None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        return f"its weights are not in the hub's cache, and the hub does not answer ({str(error).splitlines()[0][:120]})"
    return "" if any(f.endswith(".safetensors") for f in files) else "the hub has no safetensors of it"


def check_key(config: RunConfig) -> Iterator[Finding]:
    """A server that others can reach has a key to ask for."""
    host, name = config.serve.host, config.serve.api_key_env
    if auth.is_loopback(f"http://{host}"):
        yield ok("key", f"serving on {host} alone needs none")
    elif os.environ.get(name):
        yield ok("key", f"{name} is set")
    else:
        yield fail("key", f"serve.host is {host}, and {name} is not set: pi-ray serve will not start", f'\'export {name}="$(openssl rand -hex 32)"\', or set serve.host to 127.0.0.1')


def disk_needed(config: RunConfig, size: estimate.ModelSize) -> float:
    """Bytes that a run leaves on disk: an adapter for each phase, checkpoints with Adam's moments, for the run and its baseline, and the rest."""
    arms = 2 if config.evaluate.baseline else 1
    adapters, checkpoints = len(plan_phases(config.schedule)) * 4 * size.lora, (config.train.keep_checkpoints + 1) * 12 * size.lora
    return 2 * GIB + arms * (adapters + checkpoints)


def check_devices(config: RunConfig, gpus: list[tuple[str, float]]) -> Iterator[Finding]:
    """GPUs against workers. `gpus` are (name, bytes) of those that can be used."""
    workers = config.train.workers
    if config.train.gpu is False:
        yield ok("GPUs", f"none asked for (train.gpu: false), {workers} workers on CPUs")
    elif len(gpus) >= workers:
        yield ok("GPUs", f"{len(gpus)} x {gpus[0][0]} for {workers} workers")
    elif config.train.gpu is True:
        found = f"{len(gpus)} GPU{'s' if len(gpus) != 1 else ''}"
        yield fail("GPUs", f"{found} for {workers} workers, each of which needs one", f"set train.workers to {max(1, len(gpus))}, train.gpu to false, or go to a cluster: 'pi-ray submit --address URL'")
    elif gpus:
        yield note("GPUs", f"{len(gpus)} for {workers} workers, so that CPUs are used (train.gpu: auto)", f"set train.workers to {len(gpus)} to use them")
    else:
        yield ok("GPUs", f"none, {workers} workers on CPUs (train.gpu: auto)")


def check_memory(config: RunConfig, held: dict[str, float], host: float, gpus: list[tuple[str, float]], free: float) -> Iterator[Finding]:
    """The plan's memory against what there is. `held` is one worker's, `host` the node's besides, in bytes; `free` what this machine has left."""
    one, workers = sum(held.values()), config.train.workers
    smaller = "lower train.micro_batch (or batch_size), set train.gradient_checkpointing: true" + ("" if config.train.backend.zero_stage == 3 else ", or shard the model with train.backend.zero_stage: 3")
    if gpus and config.train.gpu is not False and len(gpus) >= workers:
        least = min(total for _, total in gpus)
        said = f"a worker takes about {one / GIB:.1f} GiB of its GPU's {least / GIB:.0f}"
        yield fail("memory", said, smaller + ", or take more workers") if one > 0.95 * least else ok("memory", said)
        said = f"the workers take about {host / GIB:.1f} GiB of this host's {free / GIB:.1f} GiB free"
        yield fail("memory", said, "end other programs, or leave out train.backend.offload_params and offload_optimizer") if host > free else ok("memory", said)
        return
    whole = workers * (one + WORKER)
    said = f"{workers} workers take about {whole / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
    yield fail("memory", said, f"take fewer train.workers, {smaller}, or a smaller model.base") if whole > free else ok("memory", said)
