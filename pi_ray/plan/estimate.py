"""Estimates of time and memory before training, from the model's shape alone (no weights are loaded).

Time counts multiply-adds: a frozen weight costs 2 operations per token forward and 2 backward, a LoRA weight 2 more.
They are divided by the speed of a matrix product, measured here, times the share of it that training reaches.
Communication between workers is not counted. Expect a factor of two either way, on a machine that does nothing else.
"""

import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from pi_ray.config import LoraConfig, ModelConfig, RunConfig
from pi_ray.errors import ConfigError, ModelError
from pi_ray.models import model_dtype
from pi_ray.models.base_files import resolve_base
from pi_ray.models.device import best_device, synchronize
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train.base_size import FOUR_BIT, key_value_width
from pi_ray.train.updates import updates_in_phase

# Share of a large matrix product's speed that an update reaches. cpu: measured on the demo; gpu: a guess.
REACHED = {"cpu": 0.65, "gpu": 0.3}
LAUNCH = 0.003  # seconds that a GPU needs for one layer forward and backward, however little it computes
REFERENCE_GPU = ("A100", 312e12)  # for plans made on a machine without a GPU, for a cluster that has them
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of a GPU worker's process besides the model: Python, its libraries, the CUDA context (a rule of thumb).
PROCESS = 6 * 2**30
LIVE = 10**9  # weights that ZeRO-3 keeps gathered on a worker (DeepSpeed's stage3_max_live_parameters)


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights and widths of a base model, with every expert of a mixture unless said otherwise."""

    weights: int
    active: int  # that one token is multiplied with, without the output layer: of the chosen experts alone
    head: int  # of the output layer
    block: int  # of one layer
    linear: int  # of the linear layers
    lora: int  # of the adapter
    layers: int
    hidden: int
    inner: int  # width of the chosen experts together
    key_value: int
    plain_batch_reason: str = ""  # why rows cannot share their prefix in packed batches, "" where they can


@dataclass(frozen=True)
class Speed:
    """The device of a worker, and the operations per second that training reaches on it."""

    device: str  # "cpu", which all workers share, or "gpu"
    name: str
    operations: float
    note: str


@dataclass(frozen=True)
class Shape:
    """Mean token counts of one phase: the shared prefix, a row (examples and query), its label."""

    prefix: float
    row: float
    label: float

    @property
    def fed(self) -> float:
        """Tokens of a row and its label that go through the model; the last label token is only predicted."""
        return self.row + self.label - 1


def model_size(model: ModelConfig, lora: LoraConfig) -> ModelSize:
    """Count weights on the meta device.

    Raises ModelError for an unknown model, ConfigError for LoRA targets that it does not have.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pi_ray.train.shared_prefix import why_prefix_cannot_be_shared

    try:
        folder, revision = resolve_base(model.base), model.revision or "main"
        shape = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(shape)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        cure = "A folder with its config.json is enough: model.base=FOLDER"
        raise ModelError(f"model '{model.base}' cannot be measured: {reason}. {cure}") from error
    shape, plain_batch_reason = shape.get_text_config(), why_prefix_cannot_be_shared(net)
    inner = getattr(shape, "moe_intermediate_size", None) or getattr(shape, "intermediate_size", None)
    experts = getattr(shape, "num_experts_per_tok", None) or 1
    head, table = net.get_output_embeddings().weight, net.get_input_embeddings().weight
    weights = sum(p.numel() for p in net.parameters())
    return ModelSize(
        weights=weights, active=_active_weights(net, shape, experts), head=head.numel(),
        block=(weights - sum({id(t): t.numel() for t in (head, table)}.values())) // shape.num_hidden_layers,
        linear=sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head),
        lora=_lora_weights(net, lora), layers=shape.num_hidden_layers, hidden=shape.hidden_size,
        inner=(inner or 4 * shape.hidden_size) * experts,
        key_value=key_value_width(shape), plain_batch_reason=plain_batch_reason,
    )


def _active_weights(net: Any, shape: Any, chosen: int) -> int:
    """Count the weights that one token is multiplied with: no embeddings, and only the `chosen` experts."""
    experts = getattr(shape, "num_local_experts", None) or getattr(shape, "num_experts", None) or 1
    tables = {id(net.get_input_embeddings().weight), id(net.get_output_embeddings().weight)}
    counted = [(n, p.numel()) for n, p in net.named_parameters() if id(p) not in tables]
    return round(sum(count * chosen / experts if ".experts." in name else count for name, count in counted))


def _lora_weights(net: Any, lora: LoraConfig) -> int:
    import peft

    from pi_ray.train.lora import peft_config

    # PiSSA has as many weights as LoRA; its singular values would need weights that are not loaded.
    plain = lora.model_copy(update={"method": "lora"}) if lora.method == "pissa" else lora
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft and transformers about each other; nothing that a user can change
            wrapped = peft.get_peft_model(net, peft_config(net, plain), low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"train.lora.targets: {str(error).splitlines()[0]}") from error
    return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def device_of(config: RunConfig) -> str:
    """ "gpu" when the config asks for GPUs, or leaves it open and this machine has one."""
    import torch

    return "gpu" if config.train.gpu is True or (config.train.gpu == "auto" and torch.cuda.is_available()) else "cpu"


def dtype_name(config: RunConfig) -> str:
    """The dtype of the base model's weights in training; float32 for a model that cannot be looked at from a CPU."""
    try:
        return str(model_dtype(config.model, device_of(config))).removeprefix("torch.")
    except ModelError:
        return "float32"


def measure_speed(config: RunConfig) -> Speed:
    """Measure this machine for half a second. Without a GPU here, a plan for GPUs takes the reference one."""
    import torch

    if device_of(config) == "cpu":
        if best_device() == "mps" and config.train.gpu is not False:
            peak = _matmul_speed("mps", torch.float32, 2048)
            return Speed("cpu", "Apple's GPU", REACHED["cpu"] * peak, "measured here")
        peak = _matmul_speed("cpu", torch.float32, 1024)
        return Speed("cpu", f"this CPU, {torch.get_num_threads()} threads", REACHED["cpu"] * peak, "measured here")
    if not torch.cuda.is_available():
        name, peak = REFERENCE_GPU
        return Speed("gpu", name, REACHED["gpu"] * peak, f"no GPU here, so an {name} is assumed")
    peak = _matmul_speed("cuda", getattr(torch, dtype_name(config)), 4096)
    return Speed("gpu", torch.cuda.get_device_name(), REACHED["gpu"] * peak, "measured here")


def _matmul_speed(device: str, dtype: Any, size: int, budget: float = 0.5) -> float:
    """Operations per second of the fastest of many square products, so that other work here counts little."""
    import torch

    a = torch.ones(size, size, device=device, dtype=dtype)
    wait = partial(synchronize, a.device)
    for _ in range(2):  # the first products start threads and libraries
        a @ a
    wait()
    end, fastest = time.perf_counter() + budget, math.inf
    while (start := time.perf_counter()) < end or fastest == math.inf:  # once at least
        a @ a
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def rows_per_pass(config: RunConfig) -> int:
    """Rows that a worker sends through the model at once."""
    return config.train.micro_batch or config.rows_per_worker


def update_tokens(size: ModelSize, shape: Shape, config: RunConfig) -> tuple[float, float]:
    """Tokens that pass through the model in one update, over all workers: of prefixes, of rows with their labels."""
    batch = config.train.batch_size
    return (batch / rows_per_pass(config) if config.train.share_prefix else batch) * shape.prefix, batch * shape.fed


def tokens_of_updates(config: RunConfig) -> list[float]:
    """The mean tokens of each update of a prepared run, in order: the work by which time left is foretold."""
    run, tokens_by_update = RunDir(config.root), list[float]()
    size = model_size(config.model, config.train.lora)
    for i, phase in enumerate(plan_phases(config.schedule)):
        manifest = read_manifest(run.phase(i)) or {}
        shape = Shape(*(manifest["tokens"][key] for key in ("prefix", "row_mean", "label_mean")))
        taught = not i and config.train.adopts_teacher  # by another run: no update
        updates = 0 if taught else updates_in_phase(manifest["rows"], phase, config.train.batch_size)
        tokens_by_update += [sum(update_tokens(size, shape, config))] * updates
    return tokens_by_update


def update_operations(size: ModelSize, shape: Shape, config: RunConfig) -> float:
    """Operations of one update over all workers: two for each multiply-add."""
    prefix, rows = update_tokens(size, shape, config)
    # once forward, and twice as much, or three times with recomputing, back down to the lowest adapted layer
    trips = 2 + (4 if config.train.gradient_checkpointing else 2) * config.train.lora.layers
    per_token = trips * size.active + 6 * size.lora
    attention = 12 * size.layers * size.hidden * (prefix * shape.prefix / 2 + rows * (shape.prefix + shape.fed / 2))
    return per_token * (prefix + rows) + 4 * size.head * config.train.batch_size * shape.label + attention


def update_seconds(size: ModelSize, shape: Shape, config: RunConfig, speed: Speed) -> float:
    """Seconds of one update. GPUs work side by side; CPU workers on one machine share its cores and gain nothing."""
    seconds = update_operations(size, shape, config) / speed.operations
    if speed.device == "cpu":
        return seconds
    passes = config.rows_per_worker // rows_per_pass(config)
    return max(seconds / config.train.workers, passes * size.layers * LAUNCH)


def device_memory(size: ModelSize, shape: Shape, config: RunConfig) -> dict[str, float]:
    """Bytes on one worker's device, by what holds them.

    ZeRO-1 shares Adam's state (and fp32 weights beside bfloat16 ones) among workers, ZeRO-2 also gradients, ZeRO-3 also
    the base model's weights.
    """
    train, (weights_over, gradients_over, adam_over) = config.train, _shards(config)
    width, vocabulary = BYTES[dtype_name(config)], size.head / size.hidden
    rows = rows_per_pass(config)
    tokens = (shape.prefix if train.share_prefix else rows * shape.prefix) + rows * shape.fed
    keys_and_values = 2 * size.key_value * (tokens + rows * (shape.prefix + shape.fed))
    one_layer = tokens * (8 * size.hidden + 4 * size.inner) + keys_and_values
    kept = size.layers * tokens * size.hidden + one_layer if train.gradient_checkpointing else size.layers * one_layer
    quantized = size.linear if config.model.quantize else 0
    base = quantized * FOUR_BIT + (size.weights - quantized) * width
    gathered = min(size.weights * (1 - 1 / weights_over), LIVE + size.block)
    adam = 0 if train.backend.offload_optimizer else (8 + (4 if width < 4 else 0)) / adam_over
    return {
        "base weights": 0.0 if train.backend.offload_params else base / weights_over,
        **({"gathered weights": gathered * width} if weights_over > 1 else {}),
        "LoRA weights, gradients, Adam": size.lora * (width / weights_over + width / gradients_over + adam),
        "activations": kept * width,
        "logits": 3 * 4 * rows * shape.label * vocabulary,
    }


def host_memory(size: ModelSize, config: RunConfig) -> dict[str, float]:
    """Bytes of host memory for one GPU worker, by what holds them: offloaded state, and the base as it is loaded.

    Empty on CPUs, where `device_memory` is the host's.
    """
    if device_of(config) == "cpu":
        return {}
    what = "checkpoint, which the first worker maps" if _shards(config)[0] > 1 else "base model"
    loading = f"{what} while it is loaded"
    return {**_offloaded_bytes(size, config), loading: size.weights * BYTES[dtype_name(config)]}


def node_memory(size: ModelSize, config: RunConfig, workers: int) -> float:
    """Bytes of host memory of a node with so many GPU workers: processes, offloaded state, the base as it is loaded.

    A base that is sharded is loaded once, else by each worker.
    """
    copies = 1 if _shards(config)[0] > 1 else workers
    own = workers * (PROCESS + sum(_offloaded_bytes(size, config).values()))
    return own + copies * size.weights * BYTES[dtype_name(config)]


def _offloaded_bytes(size: ModelSize, config: RunConfig) -> dict[str, float]:
    backend, (weights_over, _, adam_over) = config.train.backend, _shards(config)
    weights = {"base weights": size.weights * BYTES[dtype_name(config)] / weights_over}
    optimizer = {"LoRA weights, gradients, Adam": size.lora * (4 + 4 + 8) / adam_over}
    return {**(weights if backend.offload_params else {}), **(optimizer if backend.offload_optimizer else {})}


def _shards(config: RunConfig) -> tuple[int, int, int]:
    """Over how many workers weights, gradients and Adam's state are spread."""
    backend, workers = config.train.backend, config.train.workers
    stage = backend.zero_stage if backend.name == "deepspeed" else 0
    return workers if stage >= 3 else 1, workers if stage >= 2 else 1, workers if stage >= 1 else 1
