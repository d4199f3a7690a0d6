"""Aliases of an adapter's versions: `pi-ray release` sets them and every request looks them up.

    aliases.json    {"prod": {"version": "v0002", "canary": "v0003", "percent": 10, "before": ["v0001"]}}

A name alone stands for its alias `prod`; while there is none, for the latest version.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from pi_ray.errors import AdapterError
from pi_ray.run.artifact import digest
from pi_ray.store.verify import validate

ALIASES_FILE, LATEST_FILE = "aliases.json", "latest.json"
DEFAULT_ALIAS = "prod"  # for which a name alone stands
LATEST = "latest"  # stands for the newest version
VERSION = re.compile(r"v[0-9]{4,9}")
ALIAS = re.compile(r"(?!v[0-9])[a-z][a-z0-9_-]{0,31}")
MAX_HISTORY = 20  # versions through which `--rollback` can go back

Version = Annotated[str, Field(pattern=f"^{VERSION.pattern}$")]


@dataclass(frozen=True)
class Alias:
    """`version` answers, but for `percent` percent of requests `canary`. `before`: earlier versions, newest last."""

    version: Version
    canary: Annotated[str, Field(pattern=f"^({VERSION.pattern})?$")] = ""
    percent: Annotated[float, Field(ge=0, le=100, strict=True)] = 0.0
    before: tuple[Version, ...] = ()

    def pick(self, sticky_key: str) -> str:
        """The version that answers: always the same one for a key, and never the canary for an empty key.

        A higher percentage keeps the keys that had the canary already.
        """
        place = int(digest(f"{self.canary}:{sticky_key}")[:12], 16) / 16**12 * 100
        return self.canary if self.canary and sticky_key and place < self.percent else self.version

    def with_version(self, version: str) -> Alias:
        """`version` for all requests. Ends a canary."""
        same = version == self.version
        return Alias(version, before=self.before if same else (*self.before, self.version)[-MAX_HISTORY:])

    def rolled_back(self) -> Alias:
        """The same without its canary; where there is none, the version before. Raises AdapterError without either."""
        if self.canary:
            return replace(self, canary="", percent=0.0)
        if not self.before:
            raise AdapterError("there is no earlier version to go back to; name one with --version")
        return Alias(self.before[-1], before=self.before[:-1])


ALIASES = TypeAdapter(dict[str, Alias])


def parse_aliases(data: dict[str, Any], name: str) -> dict[str, Alias]:
    """aliases.json of the adapter `name`. Raises AdapterError when it is not as `pi-ray release` wrote it."""
    where = f"adapter '{name}': {ALIASES_FILE}"
    if not all(map(ALIAS.fullmatch, data)):
        raise AdapterError(f"{where} holds a name that no alias can have")
    return validate(ALIASES, data, where)
