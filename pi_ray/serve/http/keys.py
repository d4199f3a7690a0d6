"""Bearer keys: who may ask, and for which models. Of a key the server keeps its sha256 alone.

    # serve.keys_file, YAML or JSON: the digest of a key -> whose it is, and the models it may use (left out: all of them)
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08": {name: team-a, adapters: [colours, shapes]}

`pi-ray key team-a --adapters colours` makes a key and such a line. The file is read again when it changes, so that a key can be taken back while serving.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import yaml

from pi_ray.errors import ConfigError

log = logging.getLogger("ray.serve")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """Whose key it is and the models it may use: names as /v1/models lists them, or None for all."""

    name: str
    models: frozenset[str] | None = None

    def allows(self, model: str) -> bool:
        """`model` without its version: whoever may use an adapter may use all of its versions."""
        return self.models is None or model in self.models


EVERYTHING = Key("")


def key_digest(key: str) -> str:
    """What the server keeps of a key; "" for no key."""
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


def new_key() -> str:
    """256 random bits: too many to guess, so that a plain sha256 gives nothing away."""
    return f"pr-{secrets.token_urlsafe(32)}"


def line(key: str, name: str, adapters: list[str]) -> str:
    """The key's line for serve.keys_file."""
    entry = {"name": name, **({"adapters": adapters} if adapters else {})}
    return f'"{key_digest(key)}": {yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000).strip()}'


class Keys:
    """All keys of a server: the one whose digest it was given, and those of the file. False when it needs none."""

    def __init__(self, digest: str = "", file: str = ""):
        self._fixed = {digest: EVERYTHING} if digest else {}
        self._file = Path(file) if file else None
        self._state = _state(self._file)
        self._known = {**(load(self._file) if self._file else {}), **self._fixed}

    def __bool__(self) -> bool:
        return bool(self._known) or self._file is not None

    def find(self, authorization: bytes) -> Key | None:
        """The key of an Authorization header, or None. Every known key is compared, in the same time whichever it is."""
        self._refresh()
        scheme, _, given = authorization.partition(b" ")
        digest, found = hashlib.sha256(given.strip()).hexdigest(), None
        for known, key in self._known.items():
            if hmac.compare_digest(digest, known):
                found = key
        return found if scheme.lower() == b"bearer" else None

    def _refresh(self) -> None:
        """Read the file again when it changed. While it cannot be read or is wrong, the keys stay as they were, and the log says so once."""
        if self._file is None or (state := _state(self._file)) == self._state:
            return
        self._state = state
        try:
            self._known = {**load(self._file), **self._fixed}
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)


def load(file: Path) -> dict[str, Key]:
    """digest -> Key of a keys file. Raises ConfigError naming the entry, never with what may be a key."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"serve.keys_file {file}: {error.strerror}; 'pi-ray key NAME' prints a line for it") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"serve.keys_file {file}: not valid YAML or JSON") from None
    if not isinstance(data, dict):
        raise ConfigError(f"serve.keys_file {file}: expected lines such as 'DIGEST: {{name: team-a, adapters: [colours]}}'")
    return {digest: _key(file, number, digest, entry) for number, (digest, entry) in enumerate(data.items(), 1)}


def _key(file: Path, number: int, digest: object, entry: object) -> Key:
    where = f"serve.keys_file {file}, entry {number}"
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise ConfigError(f"{where}: a key stands there as its sha256 in 64 lower-case hex digits, never as itself; 'pi-ray key NAME' prints such a line")
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"] or set(entry) - {"name", "adapters"}:
        raise ConfigError(f"{where}: expected {{name: ...}} and, to allow some models only, adapters: [...]")
    models = entry.get("adapters", "all")
    if models == "all":
        return Key(entry["name"])
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise ConfigError(f"{where}: adapters is a list of names, or 'all'")
    return Key(entry["name"], frozenset(models))


def _state(file: Path | None) -> tuple[int, ...] | None:
    try:
        info = file.stat() if file else None
    except OSError:
        return None
    return (info.st_mtime_ns, info.st_size, info.st_ino) if info else None
