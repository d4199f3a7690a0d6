"""The workers that train together: what they agree on. One worker alone needs no network."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Group:
    """`rank` of `world`, as torch.distributed says where it is up. Every method is called by all of them, and gives each the same if it does not say otherwise."""

    def __init__(self, device: str):
        self.device = device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """On the CPU."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def at_first(self, mine: Any) -> list[Any]:
        """What each worker gave, by rank: on rank 0, and nothing on the others."""
        if self.world == 1:
            return [mine]
        parts = [None] * self.world if self.rank == 0 else None
        dist.gather_object(mine, parts)
        return parts or []

    def of_first(self, value: Any) -> Any:
        """What rank 0 gave."""
        if self.world == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, device=torch.device(self.device))
        return found[0]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()
