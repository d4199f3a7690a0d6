"""Release: which version of an adapter answers. Replicas see it with the next request, behind a URL within seconds.

Nothing is restarted. Try a version on some of the requests, give it to all of them, or go back:

    pi-ray release colours                                print versions, and which of them answers
    pi-ray release colours --version v0003 --canary 10    v0003 answers 10 % of requests
    pi-ray release colours --version v0003                v0003 answers all of them
    pi-ray release colours --rollback                     the trial ends; without one, back to the version before
    pi-ray release colours --version latest               from now on the newest published version answers
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pi_ray.errors import AdapterError, ConfigError
from pi_ray.store.adapters import AdapterStore, split_name
from pi_ray.store.aliases import ALIAS, ALIASES_FILE, DEFAULT_ALIAS, LATEST, VERSION, Alias, dump_aliases


def release_version(
    store: AdapterStore, name: str, version: str = "", canary: float | None = None, rollback: bool = False,
    alias: str = DEFAULT_ALIAS,
) -> dict[str, Alias]:  # fmt: skip
    """Change an alias of an adapter as the arguments say; without any, change nothing. Returns all its aliases.

    `canary` is a percentage. Raises ConfigError for arguments that make no sense together, AdapterError for an unknown
    or damaged version, or where there is nothing to go back to.
    """
    _check_arguments(name, version, canary, rollback, alias)
    store.latest(name)  # an adapter of this name, or an error
    if not (version or rollback or canary is not None):
        return store.aliases(name)
    with store.backend.lock(name):
        aliases = store.aliases(name)
        changed = _change(store, name, aliases.pop(alias, None), version, canary, rollback, alias)
        aliases |= {alias: changed} if changed else {}
        store.backend.write(name, ALIASES_FILE, json.dumps(dump_aliases(aliases), indent=1) + "\n")
    return aliases


def _check_arguments(name: str, version: str, canary: float | None, rollback: bool, alias: str) -> None:
    if split_name(name)[1]:
        raise ConfigError(f"'{name}': give the adapter's name alone, and the version with --version")
    if version and version != LATEST and not VERSION.fullmatch(version):
        raise ConfigError(f"--version {version}: a version looks like v0003; '{LATEST}' follows the newest one")
    if not ALIAS.fullmatch(alias) or alias == LATEST:
        allowed = "1 to 32 of a-z, 0-9, '_' and '-', starting with a letter"
        raise ConfigError(f"--alias {alias}: take {allowed}, and not '{LATEST}' or like a version")
    if canary is not None and not 0 < canary < 100:
        others = "--rollback ends a trial, --version alone gives a version to everyone"
        raise ConfigError(f"--canary {canary:g}: give a percentage between 0 and 100; {others}")
    if rollback and (version or canary is not None):
        raise ConfigError("--rollback goes alone; it ends a trial, or goes back to the version before")


def _change(
    store: AdapterStore, name: str, now: Alias | None, version: str, canary: float | None, rollback: bool, alias: str
) -> Alias | None:
    """The alias after the change; None where it is taken away, so that the newest version answers."""
    if rollback:
        if now is None:
            cure = "so there is nothing to go back to; name a version with --version"
            raise AdapterError(f"'{name}' has no alias '{alias}' yet, {cure}")
        return now.rolled_back()
    if canary is not None:
        return _with_canary(store, name, now, version, canary, alias)
    if version == LATEST and alias == DEFAULT_ALIAS:
        return None
    version = store.latest(name) if version == LATEST else version
    store.open(f"{name}@{version}")  # a version that serving would refuse is not released
    return now.with_version(version) if now else Alias(version)


def _with_canary(
    store: AdapterStore, name: str, now: Alias | None, version: str, percent: float, alias: str
) -> Alias:
    """The alias with `version`, else its present canary, else the newest version, for `percent` percent."""
    newest = store.latest(name)
    if now is None:
        if version in ("", LATEST, newest) or alias != DEFAULT_ALIAS:
            other = next((v for v in reversed(store.backend.versions(name)) if v != (version or newest)), "v0001")
            command = f"--version {other}" + (f" --alias {alias}" if alias != DEFAULT_ALIAS else "")
            first = "say first what the other requests get, such as"
            raise AdapterError(f"nothing was released as '{alias}' yet; {first} {command}")
        now = Alias(newest)
    candidate = newest if version == LATEST else version or now.canary or newest
    if candidate == now.version:
        raise AdapterError(f"{candidate} answers all requests already; name the version to try with --version")
    store.open(f"{name}@{candidate}")
    return now.with_canary(candidate, percent)


def print_aliases(store: AdapterStore, name: str, aliases: dict[str, Alias], say: Callable[[str], Any]) -> None:
    """Say in words which version answers under each alias, and list every version."""
    newest = store.latest(name)
    if DEFAULT_ALIAS not in aliases:
        say(f"{name}: {newest} answers, and whatever is published after it; --version keeps one")
    for alias, at in sorted(aliases.items(), key=lambda item: item[0] != DEFAULT_ALIAS):
        label = name if alias == DEFAULT_ALIAS else f"{name}@{alias}"
        trial = f"; {at.canary} answers {at.percent:g} % of requests on trial" if at.canary else ""
        history = f"; before: {', '.join(reversed(at.history))}" if at.history else ""
        say(f"{label}: {at.version} answers{trial}{history}")
    versions = store.backend.versions(name)
    say(f"versions: {', '.join(v + (' (newest)' if v == newest else '') for v in versions)}")


def parse_percent(text: str) -> float:
    """A percentage from the command line: "10", "0.5" or "10%"."""
    if not re.fullmatch(r"\d{1,3}(\.\d+)?\s*%?", text.strip()):
        raise ConfigError(f"--canary {text}: give a percentage between 0 and 100")
    return float(text.strip().rstrip("%"))
