"""Ray's token for a cluster's address: whether there is one, and whether the address may be used without.

Ray finds it in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, and sends it; only `pi-ray doctor` reads it.
"""

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from pi_ray.config.block import PLAIN_URL
from pi_ray.errors import ClusterError, ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
AUTHENTICATED = ("token", "k8s")  # values of RAY_AUTH_MODE by which a token is sent
CURE = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token "
    "('ray get-auth-token' prints it on the head node)"
)


def address_of(given: str = "", configured: str = "") -> str:
    """The Jobs API: --address, cluster.address, RAY_API_SERVER_ADDRESS, or here. ConfigError: it is no plain URL."""
    address = (given or configured or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).rstrip("/")
    if not re.fullmatch(PLAIN_URL, address):
        wanted = f"the URL of the cluster's Jobs API, such as {DEFAULT_ADDRESS}, without user, password or query"
        raise ConfigError(f"--address: give {wanted}; Ray's own addresses (HOST:6379, ray://) are not meant")
    return address


def is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_file() -> Path:
    """The file from which Ray takes the token, unless RAY_AUTH_TOKEN is set."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def has_token() -> bool:
    """Whether Ray would find a token. The token is not read."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file().is_file()


def require_token(address: str) -> None:
    """Have Ray send its token to `address`. Call this before `ray` is imported, which is when Ray reads RAY_AUTH_MODE.

    Raises ClusterError where there is no token, unless the address is on this machine and authentication is off there.
    """
    mode = (os.environ.get("RAY_AUTH_MODE") or ("token" if has_token() else "disabled")).lower()
    if mode != "token" and not is_loopback(address):
        danger = "without a token anyone who reaches it can run programs there"
        raise ClusterError(f"{address} is not on this machine, and {danger}. {CURE}")
    if mode == "token" and not has_token():
        raise ClusterError(f"RAY_AUTH_MODE is token, and there is no token. {CURE}")
    os.environ["RAY_AUTH_MODE"] = mode
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers this, or RAY_ADDRESS, to an argument


def secure_session(address: str) -> None:
    """Have Ray use its token where RAY_ADDRESS is `address`: HOST:PORT, ray://, or "" for a Ray of this process.

    Such a Ray can be reached from the network, so it has a token whatever RAY_AUTH_MODE says; Ray makes one. Call this
    before `ray` is imported. Raises ClusterError where a cluster on the network would be joined without authentication.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode in AUTHENTICATED:
        return
    if address in ("", "local"):
        os.environ.pop("RAY_AUTH_MODE", None)  # unset, Ray authenticates what it starts
    elif address == "auto" or not is_loopback(f"ray://{address.split('://')[-1]}"):
        if mode or not has_token():
            state = f"RAY_AUTH_MODE is {mode}" if mode else "RAY_AUTH_MODE is not set and there is no token"
            danger = "anyone who reaches that cluster can run programs there"
            raise ClusterError(f"{state}, and RAY_ADDRESS is {address}: {danger}. {CURE}")
        os.environ["RAY_AUTH_MODE"] = "token"  # for an address Ray would not do so by itself
