"""Release: which version of an adapter answers. Replicas see it with the next request (a store behind a URL: within seconds); nothing is restarted.

Try a version on some of the requests, give it to all of them, or go back:

    pi-ray release colours                                what is there, and what answers
    pi-ray release colours --version v0003 --canary 10    v0003 answers 10 % of requests
    pi-ray release colours --version v0003                v0003 answers all of them
    pi-ray release colours --rollback                     the trial ends; without one, back to the version before
    pi-ray release colours --version latest               the newest published version answers from now on, whichever it is
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pi_ray.errors import AdapterError, ConfigError
from pi_ray.store.adapters import AdapterStore, split_name
from pi_ray.store.aliases import ALIAS, ALIASES, NEWEST, SERVED, VERSION, Alias, dump


def release(store: AdapterStore, name: str, version: str = "", canary: float | None = None, rollback: bool = False, alias: str = SERVED) -> dict[str, Alias]:
    """The aliases of an adapter after the change that is asked for; without one, as they are.

    Raises ConfigError for what makes no sense together, AdapterError for an unknown or damaged version, or where there is nothing to go back to.
    """
    _check(name, version, canary, rollback, alias)
    store.latest(name)  # an adapter of this name, or an error
    if not (version or rollback or canary is not None):
        return store.aliases(name)
    with store.place.lock(name):
        aliases = store.aliases(name)
        changed = _change(store, name, aliases.get(alias), version, canary, rollback, alias)
        aliases = {**{k: v for k, v in aliases.items() if k != alias}, **({alias: changed} if changed else {})}
        store.place.write(name, ALIASES, json.dumps(dump(aliases), indent=1) + "\n")
    return aliases


def _check(name: str, version: str, canary: float | None, rollback: bool, alias: str) -> None:
    if split_name(name)[1]:
        raise ConfigError(f"'{name}': give the adapter's name alone, and the version with --version")
    if version and version != NEWEST and not VERSION.fullmatch(version):
        raise ConfigError(f"--version {version}: a version looks like v0003; '{NEWEST}' follows the newest one")
    if not ALIAS.fullmatch(alias) or alias == NEWEST:
        raise ConfigError(f"--alias {alias}: take 1 to 32 of a-z, 0-9, '_' and '-', starting with a letter, and not '{NEWEST}' or like a version")
    if canary is not None and not 0 < canary < 100:
        raise ConfigError(f"--canary {canary:g}: give a percentage between 0 and 100; --rollback ends a trial, --version alone gives a version to everyone")
    if rollback and (version or canary is not None):
        raise ConfigError("--rollback goes alone; it ends a trial, or goes back to the version before")


def _change(store: AdapterStore, name: str, now: Alias | None, version: str, canary: float | None, rollback: bool, alias: str) -> Alias | None:
    """The alias after the change; None: it is taken away, so that the newest version answers."""
    if rollback:
        if now is None:
            raise AdapterError(f"'{name}' has no alias '{alias}' yet, so there is nothing to go back to; name a version with --version")
        return now.rolled_back()
    if canary is not None:
        return _trial(store, name, now, version, canary, alias)
    if version == NEWEST and alias == SERVED:
        return None
    version = store.latest(name) if version == NEWEST else version
    store.open(f"{name}@{version}")  # what serving would refuse is not released
    return now.released(version) if now else Alias(version)


def _trial(store: AdapterStore, name: str, now: Alias | None, version: str, canary: float, alias: str) -> Alias:
    """`version`, else the one on trial, else the newest, for `canary` percent; the others keep what answers now."""
    newest = store.latest(name)
    if now is None:
        versions = store.place.versions(name)
        if version in ("", NEWEST, newest) or alias != SERVED:
            other = next((v for v in reversed(versions) if v != (version or newest)), "v0001")
            raise AdapterError(f"nothing was released as '{alias}' yet; say first what the other requests get, such as --version {other}" + _as(alias))
        now = Alias(newest)
    candidate = newest if version == NEWEST else version or now.canary or newest
    if candidate == now.version:
        raise AdapterError(f"{candidate} answers all requests already; name the version to try with --version")
    store.open(f"{name}@{candidate}")
    return now.tried(candidate, canary)


def _as(alias: str) -> str:
    return "" if alias == SERVED else f" --alias {alias}"


def show(store: AdapterStore, name: str, aliases: dict[str, Alias], say: Callable[[str], Any]) -> None:
    """What answers, in words, and every version."""
    newest = store.latest(name)
    if SERVED not in aliases:
        say(f"{name}: {newest} answers, and whatever is published after it; --version keeps one")
    for alias, at in sorted(aliases.items(), key=lambda item: item[0] != SERVED):
        label = name if alias == SERVED else f"{name}@{alias}"
        trial = f"; {at.canary} answers {at.percent:g} % of requests on trial" if at.canary else ""
        before = f"; before: {', '.join(reversed(at.before))}" if at.before else ""
        say(f"{label}: {at.version} answers{trial}{before}")
    versions = store.place.versions(name)
    say(f"versions: {', '.join(v + (' (newest)' if v == newest else '') for v in versions)}")


def percent(text: str) -> float:
    """A percentage from the command line: "10", "0.5" or "10%"."""
    if not re.fullmatch(r"\d{1,3}(\.\d+)?\s*%?", text.strip()):
        raise ConfigError(f"--canary {text}: give a percentage between 0 and 100")
    return float(text.strip().rstrip("%"))
