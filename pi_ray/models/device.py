"""The device that this process computes on: a GPU of NVIDIA or AMD ("cuda"), Apple's ("mps"), or the CPU."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BFLOAT16_MACOS = (14, 0)  # Apple's GPUs compute in bfloat16 from this macOS on


def best_device() -> str:
    """ "cuda", "mps" or "cpu": the fastest one here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def training_device(device: str, workers: int, backend: str, gpu: bool | str) -> str:
    """Where a worker trains, to which Ray Train gave `device`.

    Ray counts no Apple GPU as a GPU. One worker without DeepSpeed takes it by itself, unless `gpu` is False: torch has
    no collectives there, and DeepSpeed no kernels.
    """
    alone = device == "cpu" and workers == 1 and backend == "ddp" and gpu is not False
    return "mps" if alone and best_device() == "mps" else device


@cache
def has_bfloat16(device: str) -> bool:
    """Whether a GPU of this kind computes in bfloat16."""
    import torch

    return device != "mps" or torch.backends.mps.is_macos_or_newer(*BFLOAT16_MACOS)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given. The CPU does everything at once."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that a GPU has left; None for the CPU. Apple's shares the machine's, of which it may take most.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None
