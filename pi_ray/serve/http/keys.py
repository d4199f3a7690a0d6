"""Bearer keys: who may ask, and for which models. The server keeps only the sha256 of a key.

    # serve.keys_file, YAML or JSON: the digest of a key -> its holder, and what it may do (use all models if left out)
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08": {name: team-a, adapters: [colours, shapes]}

`pi-ray key team-a --adapters colours` makes both. The server reads a changed file again, so a key can be taken back.
"""

import hashlib
import hmac
import logging
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from pi_ray.errors import ConfigError

log = logging.getLogger("ray.serve")
DIGEST = re.compile(r"[0-9a-f]{64}")


class ApiKey(BaseModel, frozen=True, extra="forbid"):
    """The holder of a key, and the models that it may use, by their names in /v1/models."""

    name: str = Field(min_length=1)
    adapters: frozenset[str] | Literal["all"] = "all"
    full_prompt: bool = False  # whether it may ask for pi_ray.full_prompt, whose answers can give a template away
    rpm_limit: int | None = Field(None, ge=1)  # requests a minute
    tpm_limit: int | None = Field(None, ge=1)  # tokens a minute, of prompts and answers
    monthly_tokens: int | None = Field(None, ge=1)  # tokens a month (UTC); needs serve.usage_dir
    digest: str = ""  # by which the file knows the key, and what is counted or kept for it

    def allows(self, model: str) -> bool:
        """`model` without its version: a key for an adapter is good for all of its versions."""
        return self.adapters == "all" or model in self.adapters


UNRESTRICTED = ApiKey(name="anyone", full_prompt=True)  # who asks a server without keys


def key_digest(key: str) -> str:
    """The digest that the server keeps of a key; "" for no key."""
    return hashlib.sha256(key.encode()).hexdigest() if key else ""


def new_key() -> str:
    """256 random bits: too many to guess, so that a plain sha256 gives nothing away."""
    return f"pr-{secrets.token_urlsafe(32)}"


def keys_file_line(
    key: str, name: str, adapters: list[str], full_prompt: bool = False, rpm_limit: int | None = None,
    tpm_limit: int | None = None, monthly_tokens: int | None = None,
) -> str:
    """The key's line for serve.keys_file."""
    limits = {"rpm_limit": rpm_limit, "tpm_limit": tpm_limit, "monthly_tokens": monthly_tokens}
    allowed = {"adapters": adapters, "full_prompt": full_prompt, **limits}
    entry = {"name": name, **{permission: value for permission, value in allowed.items() if value}}
    text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return f'"{key_digest(key)}": {text.strip()}'


class ApiKeys:
    """All keys of a server: the one whose digest it was given, and those of the file. False when it needs none."""

    def __init__(self, digest: str = "", file: str = "", full_prompt: bool = False):
        self._fixed = {digest: ApiKey(name="environment", full_prompt=full_prompt, digest=digest)} if digest else {}
        self._file = Path(file) if file else None
        self._state = self._file and _file_state(self._file)
        self._keys = {**(load_keys(self._file) if self._file else {}), **self._fixed}

    def __bool__(self) -> bool:
        return bool(self._keys) or self._file is not None

    def find(self, authorization: bytes) -> ApiKey | None:
        """The key of an Authorization header. Every key is compared, so that the time tells nothing about them."""
        self._refresh()
        scheme, _, given = authorization.partition(b" ")
        digest, found = hashlib.sha256(given.strip()).hexdigest(), None
        for known, key in self._keys.items():
            if hmac.compare_digest(digest, known):
                found = key
        return found if scheme.lower() == b"bearer" else None

    def _refresh(self) -> None:
        """Read the file again when it changed. While it is wrong the keys stay as they were, and the log says so."""
        if self._file is None or (state := _file_state(self._file)) == self._state:
            return
        self._state = state
        try:
            self._keys = {**load_keys(self._file), **self._fixed}
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)


def load_keys(file: Path) -> dict[str, ApiKey]:
    """Digest -> ApiKey of a keys file. Raises ConfigError that names the entry, but no text that may be a key."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"serve.keys_file {file}: {error.strerror}; 'pi-ray key NAME' prints a line for it") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"serve.keys_file {file}: not valid YAML or JSON") from None
    if not isinstance(data, dict):
        expected = "lines such as 'DIGEST: {name: team-a, adapters: [colours]}'"
        raise ConfigError(f"serve.keys_file {file}: expected {expected}")
    keys = {}
    for number, (digest, entry) in enumerate(data.items(), 1):
        where = f"serve.keys_file {file}, entry {number}"
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            shape = "as its sha256 in 64 lower-case hex digits, never as itself; 'pi-ray key NAME' prints such a line"
            raise ConfigError(f"{where}: a key stands there {shape}")
        try:
            keys[digest] = ApiKey.model_validate({**entry, "digest": digest})
        except (TypeError, ValidationError):
            expected = "{name: ...} and, to allow some models only, adapters: [...], a list of names"
            expected += "; further keys: full_prompt: true, rpm_limit, tpm_limit, monthly_tokens"
            raise ConfigError(f"{where}: expected {expected}") from None
    return keys


def _file_state(file: Path) -> tuple[int, ...] | None:
    with suppress(OSError):
        info = file.stat()
        return info.st_mtime_ns, info.st_size, info.st_ino
    return None
