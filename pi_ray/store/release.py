"""Release: which version of an adapter answers. Replicas see it with the next request, behind a URL within seconds.

Nothing is restarted. A version is tried on some of the requests (a canary), given to all of them, or taken back.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pi_ray.errors import AdapterError, ConfigError
from pi_ray.store.adapters import ALIAS, ALIASES, ALIASES_FILE, DEFAULT_ALIAS, LATEST, AdapterStore, Alias, split_name
from pi_ray.store.local import VERSION


def release_version(
    store: AdapterStore, name: str, version: str = "", canary: float | None = None, rollback: bool = False,
    alias: str = DEFAULT_ALIAS,
) -> dict[str, Alias]:
    """Change an alias of an adapter as the arguments say; without any, change nothing. Returns all its aliases.

    `canary` is a percentage. Raises ConfigError for arguments that make no sense together, AdapterError for an unknown
    or damaged version, or where there is nothing to go back to.
    """
    _check_arguments(name, version, canary, rollback, alias)
    store.latest(name)  # an adapter of this name, or an error
    if not (version or rollback or canary is not None):
        return store.aliases(name)
    with store.backend.lock(name):
        aliases, newest = store.aliases(name), store.latest(name)
        now = aliases.pop(alias, None)
        if rollback:
            if now is None:
                cure = "so there is nothing to go back to; name a version with --version"
                raise AdapterError(f"'{name}' has no alias '{alias}' yet, {cure}")
            aliases[alias] = back = now.rolled_back()
            if back.version != now.version:
                store.open(f"{name}@{back.version}")  # a version that serving would refuse is not released
        elif canary is not None:
            now = now or _first_release(store, name, version, newest, alias)
            candidate = newest if version == LATEST else version or now.canary or newest
            if candidate == now.version:
                raise AdapterError(f"{candidate} answers all requests already; name the version to try with --version")
            store.open(f"{name}@{candidate}")
            aliases[alias] = replace(now, canary=candidate, percent=canary)
        elif (version, alias) != (LATEST, DEFAULT_ALIAS):  # else the alias is taken away: the newest version answers
            version = newest if version == LATEST else version
            store.open(f"{name}@{version}")
            aliases[alias] = now.with_version(version) if now else Alias(version)
        content = ALIASES.dump_json(dict(sorted(aliases.items())), indent=1).decode()
        store.backend.write(name, ALIASES_FILE, content + "\n")
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
        others = "--rollback ends a canary, --version alone gives a version to everyone"
        raise ConfigError(f"--canary {canary:g}: give a percentage between 0 and 100; {others}")
    if rollback and (version or canary is not None):
        raise ConfigError("--rollback goes alone; it ends a canary, or goes back to the version before")


def _first_release(store: AdapterStore, name: str, version: str, newest: str, alias: str) -> Alias:
    """The alias before a first canary: to the newest version, which must be another one than `version`."""
    if version in ("", LATEST, newest) or alias != DEFAULT_ALIAS:
        candidate = newest if version in ("", LATEST) else version
        other = next((v for v in reversed(store.backend.versions(name)) if v != candidate), "v0001")
        command = f"--version {other}" + (f" --alias {alias}" if alias != DEFAULT_ALIAS else "")
        first = "say first what the other requests get, such as"
        raise AdapterError(f"nothing was released as '{alias}' yet; {first} {command}")
    return Alias(newest)


def print_aliases(store: AdapterStore, name: str, aliases: dict[str, Alias], say: Callable[[str], Any]) -> None:
    """Say in words which version answers under each alias, and list every version."""
    newest = store.latest(name)
    if DEFAULT_ALIAS not in aliases:
        say(f"{name}: {newest} answers, and whatever is published after it; --version keeps one")
    for alias, at in sorted(aliases.items(), key=lambda item: item[0] != DEFAULT_ALIAS):
        label = name if alias == DEFAULT_ALIAS else f"{name}@{alias}"
        canary = f"; canary: {at.canary} answers {at.percent:g} % of requests" if at.canary else ""
        history = f"; before: {', '.join(reversed(at.before))}" if at.before else ""
        say(f"{label}: {at.version} answers{canary}{history}")
    versions = store.backend.versions(name)
    say(f"versions: {', '.join(v + (' (newest)' if v == newest else '') for v in versions)}")


def parse_percent(text: str) -> float:
    """A percentage from the command line: "10", "0.5" or "10%"."""
    if not re.fullmatch(r"\d{1,3}(\.\d+)?\s*%?", text.strip()):
        raise ConfigError(f"--canary {text}: give a percentage between 0 and 100")
    return float(text.strip().rstrip("%"))
