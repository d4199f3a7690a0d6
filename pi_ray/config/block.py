"""What every block of a run file is made of: frozen, no unknown keys, and types with their limits."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pi_ray.errors import ConfigError

Rate = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Money = Annotated[float, Field(ge=0)]
PLAIN_URL = r"https?://[^/@\s]+(/[^@?\s]*)?"  # without user, password or query


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def added(default: Any, description: str) -> Any:
    """A key that dumps leave out while it has its default, so that its arrival changed no fingerprint of runs that do not use it."""
    return Field(default, description=description, exclude_if=lambda value: value == default)


def unused(block: Block, keys: tuple[str, ...], where: str, why: str) -> None:
    """Raises ValueError where one of these keys, which go without effect, does not have its default."""
    if found := [key for key in keys if getattr(block, key) != type(block).model_fields[key].default]:
        raise ValueError(f"{where}.{found[0]} would have no effect: {why}; leave it out")


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, such as "train.lr", in nested blocks. Raises ConfigError where the key leads through a value."""
    *blocks, last = key.split(".")
    for block in blocks:
        data = data.setdefault(block, {})
        if not isinstance(data, dict):
            raise ConfigError(f"'{key}': '{block}' is a value, not a block")
    data[last] = value
