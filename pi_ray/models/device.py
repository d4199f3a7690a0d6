"""The device that this process computes on, a GPU of NVIDIA or AMD ("cuda"), Apple's ("mps") or the CPU, and the memory
that is left there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUPS = (  # of versions 2 and 1: (folder, file of the limit, file of what is used, cached files that can be let go)
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
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


def free_host_bytes() -> int:
    """Bytes of memory that this process may still take: what the machine has available, or less in a container."""
    import psutil

    free = psutil.virtual_memory().available
    for folder, limit, used, reclaimed in CGROUPS:
        limit_file, used_file = folder / limit, folder / used
        if limit_file.is_file() and used_file.is_file() and (bound := limit_file.read_text().strip()).isdigit():
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, int(bound) - int(used_file.read_text()) + int(stat.get(reclaimed, 0)))
    return max(0, free)
