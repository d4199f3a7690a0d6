"""HAProxy in front of Ray Serve, where RAY_SERVE_ENABLE_HA_PROXY=1 asks for it.

Ray brings it, and it takes a request to a replica with less of the processor than Serve's own proxy does. It is no
default: it does not always see that a client has left, bounds no client's connections, and Ray gives it two ports on
all interfaces, without a token.
"""

import atexit
import os
import resource
import shutil
import tempfile
from pathlib import Path

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
# Its files, by the variables that move them. By default they lie under /tmp, where every user of the machine may write
# to the socket that administers it.
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "a.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "m.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
CONNECTIONS, MOST_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN", 4096  # Ray's own default
# A connection has two sockets and, for one in four, a pipe of two ends; the rest is for listeners, checks and logs.
FILES_PER_CONNECTION, OTHER_FILES = 2.5, 256
PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": "8404", "RAY_SERVE_HAPROXY_METRICS_PORT": "9101"}


def is_wanted() -> bool:
    return os.environ.get(SWITCH) == "1"


def start_variables() -> dict[str, str]:
    """Variables with which Ray starts HAProxy: files of this user alone, and connections that this process may open."""
    if not is_wanted():
        return {}
    return private_files() | {CONNECTIONS: str(most_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[1]))}


def most_connections(open_files: int) -> int:
    """How many connections HAProxy may hold with at most `open_files` open files: it does not start with too many."""
    if open_files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, int((open_files - OTHER_FILES) / FILES_PER_CONNECTION)))


def private_files() -> dict[str, str]:
    """Variables that keep HAProxy's files in a folder of this user alone, which goes when this process ends."""
    # Short names: HAProxy takes 97 characters for a socket's path, of which Ray adds 57 for the node.
    folder = Path(tempfile.mkdtemp(prefix="pi-ray-ha-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {name: str(folder / file) for name, file in FILES.items()}


def describe_risks() -> str:
    """Say what HAProxy shows to the network and does not bound; "" where it is not wanted."""
    if not is_wanted():
        return ""
    ports = " and ".join(os.environ.get(name, default) for name, default in PORTS.items())
    shown = "replicas' addresses and counts of requests, to whoever reaches this machine"
    clients = "bounds no client's connections, and may keep the slot of a client that left until its time is over"
    return f"HAProxy shows its statistics ({shown}) on the ports {ports}, {clients}"
