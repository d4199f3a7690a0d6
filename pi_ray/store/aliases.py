"""Aliases of an adapter's versions: `pi-ray release` sets them and every request looks them up.

    store/<name>/latest.json     {"version": "v0003"}    the newest published version
    store/<name>/aliases.json    {"prod": {"version": "v0002", "canary": "v0003", "percent": 10, "before": ["v0001"]}}

A name alone stands for its alias `prod`; while there is none, for the latest version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pi_ray.errors import AdapterError
from pi_ray.run.artifact import digest

ALIASES_FILE, LATEST_FILE = "aliases.json", "latest.json"
DEFAULT_ALIAS = "prod"  # for which a name alone stands
LATEST = "latest"  # stands for the newest version
VERSION = re.compile(r"v[0-9]{4,9}")
ALIAS = re.compile(r"(?!v[0-9])[a-z][a-z0-9_-]{0,31}")
MAX_HISTORY = 20  # versions through which `--rollback` can go back


@dataclass(frozen=True)
class Alias:
    """`version` answers, but for `percent` percent of requests `canary`. `history`: earlier versions, newest last."""

    version: str
    canary: str = ""
    percent: float = 0.0
    history: tuple[str, ...] = ()

    def pick(self, sticky_key: str) -> str:
        """The version that answers: always the same one for a key, and never the canary for an empty key.

        A higher percentage keeps the keys that had the canary already.
        """
        place = int(digest(f"{self.canary}:{sticky_key}")[:12], 16) / 16**12 * 100
        return self.canary if self.canary and sticky_key and place < self.percent else self.version

    def with_version(self, version: str) -> Alias:
        """`version` for all requests. Ends a canary."""
        same = version == self.version
        return Alias(version, history=self.history if same else (*self.history, self.version)[-MAX_HISTORY:])

    def with_canary(self, version: str, percent: float) -> Alias:
        """`version` for `percent` percent of requests."""
        return Alias(self.version, version, percent, self.history)

    def rolled_back(self) -> Alias:
        """The same without its canary; where there is none, the version before. Raises AdapterError without either."""
        if self.canary:
            return Alias(self.version, history=self.history)
        if not self.history:
            raise AdapterError("there is no earlier version to go back to; name one with --version")
        return Alias(self.history[-1], history=self.history[:-1])


def parse_aliases(data: dict[str, Any], name: str) -> dict[str, Alias]:
    """aliases.json of the adapter `name`. Raises AdapterError when it is not as `dump_aliases` wrote it."""
    if not all(map(ALIAS.fullmatch, data)):
        raise AdapterError(f"adapter '{name}': {ALIASES_FILE} holds a name that no alias can have")
    return {alias: _parse_alias(entry, f"adapter '{name}': {ALIASES_FILE}: '{alias}'") for alias, entry in data.items()}


def dump_aliases(aliases: dict[str, Alias]) -> dict[str, Any]:
    return {
        name: {"version": alias.version, "canary": alias.canary, "percent": alias.percent, "before": alias.history}
        for name, alias in sorted(aliases.items())
    }


def _parse_alias(entry: Any, where: str) -> Alias:
    entry = entry if isinstance(entry, dict) else {}
    canary, percent, history = entry.get("canary", ""), entry.get("percent", 0), entry.get("before", [])
    version = entry.get("version")
    versions = [version, *([canary] if canary != "" else []), *(history if isinstance(history, list) else [None])]
    are_versions = all(isinstance(v, str) and VERSION.fullmatch(v) for v in versions)
    if not are_versions or type(percent) not in (int, float) or not 0 <= percent <= 100:
        raise AdapterError(f"{where} is not a version with its canary and history; 'pi-ray release' writes it")
    return Alias(str(version), canary, float(percent), tuple(history))
