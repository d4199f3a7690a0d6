"""Which version a name means: what `pi-ray release` decides and every request looks up.

    store/<name>/latest.json     {"version": "v0003"}                                                              the newest published one
    store/<name>/aliases.json    {"prod": {"version": "v0002", "canary": "v0003", "percent": 10, "before": ["v0001"]}}

A name alone means its alias `prod`; while there is none, the latest version.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from pi_ray.errors import AdapterError
from pi_ray.run.artifact import digest

ALIASES, LATEST = "aliases.json", "latest.json"
SERVED, NEWEST = "prod", "latest"  # the alias that a name alone means, and the one that always means the newest version
VERSION = re.compile(r"v[0-9]{4,9}")
ALIAS = re.compile(r"(?!v[0-9])[a-z][a-z0-9_-]{0,31}")
REMEMBERED = 20  # versions that `--rollback` can go back through


@dataclass(frozen=True)
class Alias:
    """`version` answers; of requests in `percent` percent `canary` does instead. `before`: what answered earlier, newest last."""

    version: str
    canary: str = ""
    percent: float = 0.0
    before: tuple[str, ...] = ()

    def pick(self, ticket: str) -> str:
        """The version that answers: always the same one for a ticket, and a higher percentage keeps those that were in it already. No ticket, no trial."""
        place = int(digest(f"{self.canary}:{ticket}")[:12], 16) / 16**12 * 100
        return self.canary if self.canary and ticket and place < self.percent else self.version

    def released(self, version: str) -> Alias:
        """`version` for everyone. Ends a trial."""
        before = self.before if version == self.version else (*self.before, self.version)[-REMEMBERED:]
        return Alias(version, before=before)

    def tried(self, version: str, percent: float) -> Alias:
        """`version` for `percent` percent of requests."""
        return Alias(self.version, version, percent, self.before)

    def rolled_back(self) -> Alias:
        """The trial ended, or where there is none, the version before. Raises AdapterError when nothing was before."""
        if self.canary:
            return Alias(self.version, before=self.before)
        if not self.before:
            raise AdapterError("there is no earlier version to go back to; name one with --version")
        return Alias(self.before[-1], before=self.before[:-1])


def parse(data: dict[str, Any], name: str) -> dict[str, Alias]:
    """aliases.json of the adapter `name`. Raises AdapterError when it is not what `dump` wrote."""
    return {alias: _alias(entry, f"adapter '{name}': {ALIASES}: '{alias[:40]}'") if ALIAS.fullmatch(alias) else _wrong(name) for alias, entry in data.items()}


def dump(aliases: dict[str, Alias]) -> dict[str, Any]:
    return {name: asdict(alias) for name, alias in sorted(aliases.items())}


def _alias(entry: Any, where: str) -> Alias:
    entry = entry if isinstance(entry, dict) else {}
    version, canary, percent, before = entry.get("version"), entry.get("canary", ""), entry.get("percent", 0), entry.get("before", [])
    versions = [version, *([canary] if canary != "" else []), *(before if isinstance(before, list) else [None])]
    if not all(isinstance(v, str) and VERSION.fullmatch(v) for v in versions) or type(percent) not in (int, float) or not 0 <= percent <= 100:
        raise AdapterError(f"{where} is not a version with its trial and history; 'pi-ray release' writes it")
    return Alias(version, canary, float(percent), tuple(before))


def _wrong(name: str) -> Alias:
    raise AdapterError(f"adapter '{name}': {ALIASES} holds a name that no alias can have")
