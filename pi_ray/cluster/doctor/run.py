"""Checks of a run: its rows and models, and whether they fit into this machine's memory and GPUs."""

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pi_ray.cluster import auth
from pi_ray.cluster.doctor.finding import Finding, fail, note, ok
from pi_ray.cluster.doctor.machine import GIB, ROOM
from pi_ray.compress.generation import GenerationCompressor
from pi_ray.config import OWN_ROWS, Block, CompressConfig, RunConfig
from pi_ray.errors import ConfigError, MissingExtraError, ModelError, PiRayError
from pi_ray.hosted import is_hosted
from pi_ray.hosted.client import Service
from pi_ray.models import load_tokenizer
from pi_ray.models.base_files import resolve_base
from pi_ray.models.device import free_host_bytes
from pi_ray.plan import estimate, plan
from pi_ray.protocols import UNLABELLED, Reject
from pi_ray.registry import tasks
from pi_ray.retrieve import encoders
from pi_ray.run.phases import distinct_rates, max_shots
from pi_ray.schedule import plan_phases
from pi_ray.train import trackers

SCORERS = ("llmlingua", "longllmlingua", "llmlingua2", "selective")  # compressors that load a model
MODEL_CURE = "to a hub id that this machine reaches, or to a folder with config.json, tokenizer and safetensors"


def check_data(config: RunConfig) -> Finding:
    """Check that the template and the first row of train and test can be read, or of queries that are answered first.
    """
    splits = ([UNLABELLED] if config.task.queries else []) if config.answers_first else ["train", "test"]
    fields = '"messages": ...' if config.prompt.conversation else '"query": ..., "answer": ...'
    try:
        task = tasks[config.task.name](config.task)
        template = task.template()
        first = {split: next(iter(task.rows(split)), None) for split in splits}
    except (PiRayError, OSError) as error:
        own = f"; task.folder names the data of {config.task.name}" if config.task.name not in OWN_ROWS else ""
        return fail("data", str(error), f"check the task block: paths start from the run file's folder{own}")
    for split, row in first.items():
        if row is None or isinstance(row, Reject):
            message = f"{row.source}:{row.line}: {row.reason}" if row else f"the {split} split is empty"
            key, fields = ("queries", '"query": ...') if split == UNLABELLED else (split, fields)
            return fail("data", message, f"mend the first row of task.{key}; each line is {{{fields}}}")
    length = f"template of {len(template.text):,} characters"
    rows = f"first rows of {' and '.join(splits)} can be read" if splits else "its queries are generated"
    return ok("data", f"{config.task.name}: {length}, {rows}")


def check_model(config: RunConfig) -> tuple[Finding, estimate.ModelSize | None]:
    """Check the base model's shape, tokenizer and weights; its size, where they are all there."""
    name = config.model.base
    try:
        size = estimate.model_size(config.model, config.train.lora)
        load_tokenizer(config.model)
        missing = _missing_weights(name, config.model.revision)
    except (ModelError, MissingExtraError, ConfigError) as error:
        return fail("model", str(error), f"set model.base {MODEL_CURE}; HF_TOKEN for models behind a licence"), None
    if missing:
        cure = f"download the whole model: 'hf download {name}' fills the hub's cache, HF_HOME says where"
        return fail("model", f"{name}: {missing}", cure), None
    return ok("model", f"{name}: {size.weights / 1e6:,.0f}M weights, tokenizer and weights can be read"), size


def other_models(config: RunConfig) -> dict[str, str]:
    """Key -> each model that preparation loads besides the base model."""
    found = {key: own.model for key, own in _compressors(config).items() if own.name in SCORERS}
    encoder = config.retrieve.encoder_model
    if _loads_encoder(config) and encoder not in encoders.PACKAGED:
        whole = "/" in encoder or Path(encoder).is_dir()  # as the package reads a name
        found["retrieve.encoder_model"] = encoder if whole else f"sentence-transformers/{encoder}"
    return {key: name for key, name in found.items() if name != config.model.base}


def check_preparation(config: RunConfig, elsewhere: Sequence[str] = ()) -> Iterator[Finding]:
    """Check the weights of `other_models`, but for the keys whose models lie `elsewhere`."""
    for key, name in other_models(config).items():
        if key in elsewhere:
            continue
        try:
            missing = _missing_weights(name)
        except (ModelError, MissingExtraError) as error:
            missing = str(error).partition(";")[0]
        if missing:
            yield fail("model", f"{key}: {name}: {missing}", f"set {key} {MODEL_CURE}")
        else:
            yield ok("model", f"{key}: {name}: weights can be read")


def check_extras(config: RunConfig) -> Iterator[Finding]:
    """Check packages, and keys of services, that only some settings need."""
    encoder = encoders.PACKAGED.get(config.retrieve.encoder_model, ("",))[0]
    packages = {
        "model.quantize": "bitsandbytes" if config.model.quantize else "",
        "retrieve.encoder_model": encoder if _loads_encoder(config) else "",
        "train.tracker": trackers.PACKAGES.get(config.train.tracker, ""),
        "serve.engine": "vllm" if config.serve.engine == "vllm" else "",
        "evaluate.engine": "vllm" if config.evaluate.engine == "vllm" else "",
    }
    for key, package in packages.items():
        if package and find_spec(package) is None:
            cure = f"'pip install {package.replace('_', '-')}', on every node"
            yield fail("extras", f"{key} needs the package {package}, which is not installed", cure)
    services: list[tuple[Callable[[Any], object], Block]] = [
        (GenerationCompressor, own) for own in _compressors(config).values() if own.name == "generation"
    ]
    if is_hosted(config) or any(metric.asks_service for metric in config.task.metric):
        services.append((Service, config.closed))
    for service, settings in services:
        try:
            service(settings)
        except (ConfigError, MissingExtraError) as error:
            yield fail("extras", str(error), "do that where pi-ray is started, and on every node")


def _compressors(config: RunConfig) -> dict[str, CompressConfig]:
    """Key of its model -> each compressor, where the schedule has something to compress."""
    own = config.compress
    documents = {"compress.documents.model": own.for_documents} if own.documents else {}
    compresses = any(0 < rate < 1 for rate in distinct_rates(config))
    return {"compress.model": own.for_instruction, **documents} if compresses else {}


def _loads_encoder(config: RunConfig) -> bool:
    """Whether retrieval loads an encoder's model (with method "auto", where the bank is large)."""
    asked = config.retrieve
    encodes = asked.encoder == "sentence-transformers" and (asked.score == "embedding" or asked.method != "exact")
    return bool(max_shots(config)) and encodes


def _missing_weights(name: str, revision: str = "") -> str:
    """Why a model's weights cannot be had, or "". They are not read: the hub is asked for their names."""
    place = resolve_base(name)
    if Path(place).is_dir():
        return "" if any(Path(place).glob("*.safetensors")) else f"no weights (*.safetensors) in {place}"
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    names = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(place, file, revision=revision or None), str) for file in names):
        return ""
    try:
        files = HfApi().list_repo_files(place, revision=revision or None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        return f"its weights are not in the hub's cache, and the hub does not answer ({reason})"
    return "" if any(f.endswith(".safetensors") for f in files) else "the hub has no safetensors of it"


def check_key(config: RunConfig) -> Finding:
    """Check that a server which others can reach has a key to ask for."""
    host, name = config.serve.host, config.serve.api_key_env
    if auth.is_loopback(f"http://{host}"):
        return ok("key", f"serving on {host} alone needs none")
    if os.environ.get(name) or config.serve.keys_file:
        return ok("key", f"{name if os.environ.get(name) else 'serve.keys_file'} is set")
    cure = f'\'export {name}="$(openssl rand -hex 32)"\', or set serve.host to 127.0.0.1'
    return fail("key", f"serve.host is {host}, and {name} is not set: pi-ray serve will not start", cure)


def disk_needed(config: RunConfig, size: estimate.ModelSize) -> float:
    """Bytes that a run and its baseline leave on disk: adapters, checkpoints with Adam's moments, and the rest."""
    runs = 2 if config.evaluate.baseline else 1
    adapters = len(plan_phases(config.schedule)) * 4 * size.lora
    checkpoints = (config.train.keep_checkpoints + 1) * 12 * size.lora
    return ROOM + runs * (adapters + checkpoints)


def check_devices(config: RunConfig, gpus: list[tuple[str, float]]) -> Finding:
    """Check usable GPUs, each (name, bytes), against the training workers."""
    workers = config.train.min_workers or config.train.workers
    if config.train.gpu is False:
        return ok("GPUs", f"none asked for (train.gpu: false), {workers} workers on CPUs")
    if len(gpus) >= workers:
        return ok("GPUs", f"{len(gpus)} x {gpus[0][0]} for {workers} workers")
    if config.train.gpu is True:
        found = f"{len(gpus)} GPU{'s' if len(gpus) != 1 else ''}"
        fewer = f"set train.workers to {max(1, len(gpus))}, train.gpu to false"
        cure = f"{fewer}, or go to a cluster: 'pi-ray submit --address URL'"
        return fail("GPUs", f"{found} for {workers} workers, each of which needs one", cure)
    if gpus:
        message = f"{len(gpus)} for {workers} workers, so that CPUs are used (train.gpu: auto)"
        return note("GPUs", message, f"set train.workers to {len(gpus)} to use them")
    return ok("GPUs", f"none, {workers} workers on CPUs (train.gpu: auto)")


def check_plan(config: RunConfig, gpus: list[tuple[str, float]]) -> Iterator[Finding]:
    """Check that the run can be planned, and that this machine's memory holds it."""
    try:
        made = plan.plan_run(config)
    except PiRayError as error:
        yield fail("plan", str(error), "mend that; 'pi-ray plan' then shows the run before it runs")
        return
    host = estimate.node_memory(made.size, config, min(len(gpus), config.train.workers))
    yield from check_memory(config, made.memory, host, gpus, free_host_bytes())


def check_memory(
    config: RunConfig, worker: dict[str, float], host: float, gpus: list[tuple[str, float]], free: float,
) -> Iterator[Finding]:
    """Check a plan's bytes: a `worker`'s on its device, and those of all GPU workers on the `host` with its `free`."""
    one, workers = sum(worker.values()), config.train.workers
    least = config.train.min_workers or workers
    smaller = "lower train.micro_batch (or batch_size), set train.gradient_checkpointing: true"
    if config.train.backend.zero_stage != 3:
        smaller += ", or shard the model with train.backend.zero_stage: 3"
    if gpus and config.train.gpu is not False and len(gpus) >= least:
        smallest = min(total for _, total in gpus)
        message = f"a worker takes about {one / GIB:.1f} GiB of its GPU's {smallest / GIB:.0f}"
        yield _fits(one <= 0.95 * smallest, message, f"{smaller}, or take more workers")
        message = f"the workers take about {host / GIB:.1f} GiB of this host's {free / GIB:.1f} GiB free"
        cure = "end other programs, or leave out train.backend.offload_params and offload_optimizer"
        yield _fits(host <= free, message, cure)
        return
    whole = workers * (one + GIB)  # a worker's process takes about 1 GiB besides the model
    message = f"{workers} workers take about {whole / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
    yield _fits(whole <= free, message, f"take fewer train.workers, {smaller}, or a smaller model.base")


def _fits(fits: bool, message: str, cure: str) -> Finding:
    return ok("memory", message) if fits else fail("memory", message, cure)
