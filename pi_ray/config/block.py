"""The base class of every block of a run file: frozen, no unknown keys, and number types with their limits."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pi_ray.errors import ConfigError

Rate = Annotated[float, Field(ge=0, le=1)]
LARGEST = 10**15  # number of anything: more is a slip, and what no float tells apart
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Amount = Annotated[float, Field(ge=0)]  # of money, seconds, or a Ray resource
CREDENTIALS = re.compile(  # user or password before the host, or a query such as ?secret_key=
    r"://(?!anonymous@)([^/@]*@|[^/@]*:[^@]*@)|[?&][^=&]*(key|token|secret|sig|passw|credential)[^=&]*=", re.I
)
PLAIN_URL = r"https?://[^/@?#\s]+(/[^@?#\s]*)?"  # without user, password or query


class Block(BaseModel):
    """A block checks its keys together in pydantic's `model_post_init`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def doc(default: Any, description: str) -> Any:
    """A field with its default and the sentence that schema and docs show for it."""
    return Field(default, description=description)


def omit_default(default: Any, description: str) -> Any:
    """As `doc`, a field that dumps omit at its default, so that a new key changes no fingerprint of runs without it."""
    return Field(default, description=description, exclude_if=lambda value: value == default)


def forbid_unused(block: Block, keys: tuple[str, ...], where: str, why: str) -> None:
    """Raise ValueError for the first of `keys` that is set, though none of them has an effect in this block."""
    for key in keys:
        if getattr(block, key) != type(block).model_fields[key].default:
            raise ValueError(f"{where}.{key} would have no effect: {why}; leave it out")


def refuse(wrong: object, message: str) -> None:
    """Raise ValueError(message) if `wrong` is true; pydantic turns the message into a mistake at the block."""
    if wrong:
        raise ValueError(message)


def check_plain_url(url: str, key: str, secret_goes: str = "the key belongs in the environment") -> None:
    """Raise ValueError for a URL that could hold a secret. An empty one is fine."""
    wrong = url and not re.fullmatch(PLAIN_URL, url)
    refuse(wrong, f"{key} must be an http or https URL without user, password or query; {secret_goes}")


def check_storage_url(url: str, key: str) -> None:
    """Raise ValueError for a URL of storage that holds a secret, which would stand in run.yaml and in messages."""
    cure = "providers' own places (the environment, ~/.aws, a role of the machine) are for them"
    refuse(CREDENTIALS.search(url), f"{key} may not hold a user, a password or a key; {cure}")


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, such as "train.lr" or "task.metric.0.file", in nested blocks and lists.

    Raises ConfigError if the key leads through a value or past the end of a list.
    """
    *blocks, last = key.split(".")
    place: Any = data
    for block in blocks:
        place = place[_position(place, block, key)] if isinstance(place, list) else place.setdefault(block, {})
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"'{key}': '{block}' is a value, not a block")
    place[_position(place, last, key) if isinstance(place, list) else last] = value


def _position(place: list[Any], name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise ConfigError(f"'{key}': '{name}' is no position in a list of {len(place)}")
    return int(name)
