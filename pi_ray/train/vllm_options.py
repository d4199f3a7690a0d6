"""Settings of vLLM for a base model and its adapters, the same for a server and for many prompts at once."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from pi_ray.config import RunConfig
from pi_ray.models import model_dtype
from pi_ray.models.device import free_host_bytes
from pi_ray.train.replicas import replica_gpus

SUPPORTED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM has kernels for
NO_TELEMETRY = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_DO_NOT_TRACK": "1"}
UNBOUND_THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # Ray places replicas; bound ones would share their cores


def is_installed() -> bool:
    return find_spec("vllm") is not None


def is_for_cpus() -> bool:
    """Whether the vLLM that is installed is its build for CPUs. Raises ImportError where none is."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def engine_options(config: RunConfig, on_cpus: bool) -> dict[str, Any]:
    """vLLM's engine arguments for the base model, over as many GPUs as one copy takes. Raises ConfigError, ModelError.

    Ray's actors hold the parts of a copy on GPUs; vLLM has them in processes of its own on CPUs, where Ray's have none.
    """
    model, parts = config.model, replica_gpus(config)
    return {
        "dtype": str(model_dtype(model, "cpu" if on_cpus else "cuda")).removeprefix("torch."),
        "trust_remote_code": False, "enable_lora": True, "tensor_parallel_size": parts,
        **({"distributed_executor_backend": "mp"} if on_cpus and parts > 1 else {}),
        **({"revision": model.revision} if model.revision else {}),
        **({"quantization": "bitsandbytes"} if model.quantize else {}),
    }


def supported_rank(ranks: Iterable[int]) -> int | None:
    """The smallest rank of vLLM's kernels that holds adapters of all these ranks; None where there is none."""
    highest = max(ranks)
    return next((rank for rank in SUPPORTED_RANKS if rank >= highest), None)


def adapter_places(adapters: int, on_cpus: bool) -> int:
    """Places for so many adapters in one batch. On CPUs the last one stays empty: in a batch with adapters vLLM's build
    for CPUs (0.29 to 0.32) computes rows of the base alone with what lies there.
    """
    return adapters + on_cpus


def cpu_cache_bytes(copies: int = 1) -> int:
    """Bytes of keys and values for one of so many copies on this machine, where vLLM would take nearly all memory."""
    return free_host_bytes() // (4 * copies)


def environment(on_cpus: bool) -> dict[str, str]:
    """Environment variables of each process of vLLM."""
    return NO_TELEMETRY | (UNBOUND_THREADS if on_cpus else {})
