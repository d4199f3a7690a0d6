"""Collectives of the workers that train together. One worker alone needs no network."""

import socket
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from pi_ray.errors import TrainingError


class WorkerGroup:
    """`rank` of `world`, by torch.distributed where it is initialised. All workers call each method together."""

    def __init__(self, device: str):
        self.device = device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over workers, on the CPU."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def gather_to_rank0(self, value: Any) -> list[Any]:
        """Every worker's value, by rank, on rank 0; an empty list on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def broadcast_from_rank0(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device(self.device))
        return values[0]

    def refuse_other_versions(self, packages: Sequence[str]) -> None:
        """Raise TrainingError, on every worker, where a host has another version of pi-ray or of these packages than
        the first worker's: what they compute together would be neither's.
        """
        own = {package: _version(package) for package in ("pi-ray", *packages)}
        (host, first), *others = self.gather_to_rank0((socket.gethostname(), own)) or [("", own)]
        told = ""
        for name, found in others:
            differ = [f"{p} {found[p]} (not {first[p]})" for p in own if found[p] != first[p]]
            told = told or (f"{name} has {', '.join(differ)}, as {host} has" if differ else "")
        if told := self.broadcast_from_rank0(told):
            raise TrainingError(f"{told}; install the same versions on every host, or use one image")

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
