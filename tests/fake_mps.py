"""Apple's GPU on machines that have none: tensors of the device "mps" lie on the CPU, and what it cannot do fails.

    with FakeMps():
        model.to("mps")        # stays on the CPU
        torch.ones(2, dtype=torch.float64, device="mps")        # TypeError, as there
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")


class FakeMps(TorchFunctionMode):
    """Counts in `moved` how often the device was named."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = [*args, *(kwargs or {}).values()]
        if not any(_is_mps(value) for value in asked):
            return func(*args, **(kwargs or {}))
        here = [torch.device("cpu") if _is_mps(value) else value for value in args]
        made = func(*here, **{k: torch.device("cpu") if _is_mps(v) else v for k, v in (kwargs or {}).items()})
        self.moved += 1
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
        return made


def _is_mps(value: Any) -> bool:
    return value == "mps" if isinstance(value, str) else isinstance(value, torch.device) and value == MPS
