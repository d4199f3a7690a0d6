"""Collectives of the workers that train together. One worker alone needs no network."""

from typing import Any

import torch
import torch.distributed as dist


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

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
