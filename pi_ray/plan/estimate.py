"""How large, how long, how much memory: estimates before training, from the model's shape alone (no weights are loaded).

Time counts multiply-adds: a frozen weight costs 2 operations per token forward and 2 backward, a LoRA weight 2 more. They are divided by the
speed of a matrix product measured here for half a second, times the share of it that training reaches. Talk between workers is not counted.
Expect a factor of two either way, on a machine that does nothing else.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pi_ray.errors import ConfigError, ModelError
from pi_ray.models import resolve

if TYPE_CHECKING:
    from pi_ray.config import LoraConfig, ModelConfig, RunConfig

REACHED = {"cpu": 0.65, "gpu": 0.3}  # share of a large matrix product's speed that a training step reaches; cpu: measured on the demo, gpu: a guess
LAUNCH = 0.003  # seconds that a GPU needs for one layer forward and backward however little it computes
REFERENCE_GPU = ("A100", 312e12)  # for plans made on a machine without a GPU for a cluster that has them
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FOUR_BIT = 0.516  # bytes of a weight in NF4 with its doubly quantised scales (Dettmers et al. 2023: 0.127 bits a weight)
PROCESS = 6 * 2**30  # bytes of a GPU worker's process besides the model: Python, its libraries, the CUDA context (a rule of thumb)
LIVE = 10**9  # weights that ZeRO-3 keeps gathered on a worker for their next use (stage3_max_live_parameters as DeepSpeed has it)


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights (all, used by one token without the output layer, output layer, one layer, linear layers, LoRA) and widths of a base model.

    A mixture of experts holds all its experts, of which a token uses a few: `weights`, `block` and `linear` count all, `active` and `inner` those used.
    `apart`: why its rows cannot share their prefix, "" where they can.
    """

    weights: int
    active: int
    head: int
    block: int
    linear: int
    lora: int
    layers: int
    hidden: int
    inner: int
    key_value: int
    apart: str = ""


@dataclass(frozen=True)
class Speed:
    """Operations per second that training reaches on one worker, and on what device. CPU workers share one machine."""

    device: str
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


def model_size(model: ModelConfig, lora: LoraConfig, longest: float = 0) -> ModelSize:
    """Count weights on the meta device; `longest`: tokens of the longest row with its prefix. Raises ModelError for an unknown model, ConfigError for LoRA targets it does not have."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pi_ray.train.shared_prefix import can_share_prefix

    try:
        shape = AutoConfig.from_pretrained(resolve(model.base), revision=model.revision or "main", trust_remote_code=False)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(shape)
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{model.base}' cannot be measured: {str(error).strip().splitlines()[0].rstrip('.')}. A folder with its config.json is enough: model.base=FOLDER") from error
    shape, apart = shape.get_text_config(), can_share_prefix(net, longest)
    heads = getattr(shape, "num_attention_heads", None) or 1  # recurrent models have none
    width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    top = getattr(shape, "num_experts_per_tok", None) or 1
    head, table = net.get_output_embeddings().weight, net.get_input_embeddings().weight
    weights = sum(p.numel() for p in net.parameters())
    return ModelSize(
        weights=weights,
        active=_active(net, shape, top),
        head=head.numel(),
        block=(weights - sum({id(t): t.numel() for t in (head, table)}.values())) // shape.num_hidden_layers,
        linear=sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head),
        lora=_lora_weights(net, lora),
        layers=shape.num_hidden_layers,
        hidden=shape.hidden_size,
        inner=(getattr(shape, "moe_intermediate_size", None) or getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size) * top,
        key_value=(getattr(shape, "num_key_value_heads", None) or heads) * width,
        apart=apart,
    )


def shares_prefix(size: ModelSize, config: RunConfig) -> bool:
    """Whether training computes the template once for each pass, and not with every row."""
    return config.train.share_prefix and not size.apart


def _active(net: Any, shape: Any, top: int) -> int:
    """Weights that one token is multiplied with: no embeddings, and of a mixture of experts only the chosen ones."""
    experts = getattr(shape, "num_local_experts", None) or getattr(shape, "num_experts", None) or 1
    tables = {id(net.get_input_embeddings().weight), id(net.get_output_embeddings().weight)}
    counted = [(n, p.numel()) for n, p in net.named_parameters() if id(p) not in tables]
    return round(sum(count * top / experts if ".experts." in name else count for name, count in counted))


def _lora_weights(net: Any, lora: LoraConfig) -> int:
    import peft

    from pi_ray.train.lora import peft_config

    plain = lora.model_copy(update={"method": "lora"}) if lora.method == "pissa" else lora  # as many, and no singular values of weights that are not there
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


def dtype_of(config: RunConfig) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if device_of(config) == "gpu" else "float32"


def measure_speed(config: RunConfig, budget: float = 0.5) -> Speed:
    """Probe this machine for `budget` seconds; without a GPU here, a plan for GPUs takes the reference one."""
    import torch

    if device_of(config) == "cpu":
        return Speed("cpu", f"this CPU, {torch.get_num_threads()} threads", REACHED["cpu"] * _matmul("cpu", torch.float32, 1024, budget), "measured here")
    if not torch.cuda.is_available():
        name, peak = REFERENCE_GPU
        return Speed("gpu", name, REACHED["gpu"] * peak, f"no GPU here, so an {name} is assumed")
    peak = _matmul("cuda", getattr(torch, dtype_of(config)), 4096, budget)
    return Speed("gpu", torch.cuda.get_device_name(), REACHED["gpu"] * peak, "measured here")


def _matmul(device: str, dtype: Any, size: int, budget: float) -> float:
    """Operations per second of a square matrix product: the fastest of many, so that other work on the machine counts little."""
    import torch

    a = torch.ones(size, size, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(2):  # the first products start threads and libraries
        a @ a
    wait()
    end, fastest = time.perf_counter() + budget, math.inf
    while (start := time.perf_counter()) < end:
        a @ a
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def update_operations(size: ModelSize, shape: Shape, config: RunConfig) -> float:
    """Multiply-adds times two of one update, over all workers."""
    train = config.train
    micro = train.micro_batch or config.rows_per_worker
    passes = train.batch_size / micro if shares_prefix(size, config) else train.batch_size
    prefix, rows = passes * shape.prefix, train.batch_size * shape.fed
    trips = 6 if train.gradient_checkpointing else 4  # recomputing adds one more forward pass
    per_token = trips * size.active + 6 * size.lora
    attention = 12 * size.layers * size.hidden * (prefix * shape.prefix / 2 + rows * (shape.prefix + shape.fed / 2))
    return per_token * (prefix + rows) + 4 * size.head * train.batch_size * shape.label + attention


def update_seconds(size: ModelSize, shape: Shape, config: RunConfig, speed: Speed) -> float:
    """GPUs work side by side, one for each worker; CPU workers on one machine share its cores and gain nothing."""
    seconds = update_operations(size, shape, config) / speed.operations
    if speed.device == "cpu":
        return seconds
    passes = config.rows_per_worker // (config.train.micro_batch or config.rows_per_worker)
    return max(seconds / config.train.workers, passes * size.layers * LAUNCH)


def memory(size: ModelSize, shape: Shape, config: RunConfig) -> dict[str, float]:
    """Bytes on one worker's device, by what holds them. ZeRO 1 shares Adam's state (and fp32 weights beside bfloat16 ones) among workers, 2 also gradients, 3 also the weights."""
    train = config.train
    share = _shares(config)
    width, off = BYTES[dtype_of(config)], train.backend.offload_optimizer
    rows = train.micro_batch or config.rows_per_worker
    tokens = (shape.prefix if shares_prefix(size, config) else rows * shape.prefix) + rows * shape.fed
    one_layer = tokens * (8 * size.hidden + 2 * size.key_value + 4 * size.inner) + 2 * size.key_value * rows * (shape.prefix + shape.fed)
    kept = size.layers * tokens * size.hidden + one_layer if train.gradient_checkpointing else size.layers * one_layer
    vocabulary = size.head / size.hidden
    gathered = min(size.weights * (1 - 1 / share[0]), LIVE + size.block)
    return {
        "base weights": 0.0 if train.backend.offload_params else _base(size, config) / share[0],
        **({"gathered weights": gathered * width} if share[0] > 1 else {}),
        "LoRA weights, gradients, Adam": size.lora * (width / share[0] + width / share[1] + (0 if off else (8 + (4 if width < 4 else 0)) / share[2])),
        "activations": kept * width,
        "logits": 3 * 4 * rows * shape.label * vocabulary,
    }


def host_memory(size: ModelSize, config: RunConfig) -> dict[str, float]:
    """Bytes of host memory for one GPU worker, by what holds them: what is offloaded, and what loading takes. Empty on CPUs, where `memory` is the host's."""
    if device_of(config) == "cpu":
        return {}
    loading = "checkpoint, which the first worker maps while it is loaded" if _shares(config)[0] > 1 else "base model while it is loaded"
    return {**_offloaded(size, config), loading: size.weights * BYTES[dtype_of(config)]}


def node_memory(size: ModelSize, config: RunConfig, workers: int) -> float:
    """Bytes of host memory of a node with so many GPU workers: their processes, what is offloaded, and the base as it is loaded (once where it is sharded, else by each)."""
    copies = 1 if _shares(config)[0] > 1 else workers
    return workers * (PROCESS + sum(_offloaded(size, config).values())) + copies * size.weights * BYTES[dtype_of(config)]


def _offloaded(size: ModelSize, config: RunConfig) -> dict[str, float]:
    backend, share = config.train.backend, _shares(config)
    return {
        **({"base weights": size.weights * BYTES[dtype_of(config)] / share[0]} if backend.offload_params else {}),
        **({"LoRA weights, gradients, Adam": size.lora * (4 + 4 + 8) / share[2]} if backend.offload_optimizer else {}),
    }


def _shares(config: RunConfig) -> list[int]:
    """Over how many workers weights, gradients and Adam's state are spread."""
    backend = config.train.backend
    stage = backend.zero_stage if backend.name == "deepspeed" else 0
    return [1 if stage < level else config.train.workers for level in (3, 2, 1)]


def _base(size: ModelSize, config: RunConfig) -> float:
    """Bytes of the whole base model."""
    small = size.linear if config.model.quantize else 0
    return small * FOUR_BIT + (size.weights - small) * BYTES[dtype_of(config)]
