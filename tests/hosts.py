"""A Ray head on this machine, and hosts of one machine: network namespaces on a bridge, each with its own address and
Ray node, whose link can be cut and which can be switched off. These need root and iproute2.

Storage is this machine's disk, which every host sees, as an NFS mount would be.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.faults.service import free_port

BIN = Path(sys.executable).parent
SUBNET = "10.231.7"
TOKEN = "a-token-that-only-this-test-knows-0123456789"
FAST = {  # a dead host is noticed in seconds, not in Ray's half a minute
    "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}  # fmt: skip
# of a node, none of them tested: no process that carries workers' prints to a driver, few bytes for objects
SPARE = ("--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats", "--include-log-monitor=false")


def environment(home: Path, **own: str) -> dict[str, str]:
    """That of a node or of a person: a home of its own, so that no token of this machine's user is found or made."""
    home.mkdir(parents=True, exist_ok=True)
    base = {"PATH": f"{BIN}:/usr/sbin:/sbin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "COLUMNS": "160"}
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return {**base, **quiet, **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}), **own}


def wait(
    what: str, seen: Callable[[], Any], process: subprocess.Popen | None = None, said: Callable[[], str] = str,
    seconds: float = 240,
) -> Any:
    """What `seen` returns as soon as it is true, while `process` lives; with what it `said`, if not. An OSError counts
    as not yet.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):
            if found := seen():
                return found
        if process and process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"did not come: {what}\n{said()[-4000:]}")


def get(url: str, token: str = TOKEN) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


def alive(url: str) -> set[str]:
    """Addresses of the nodes that the head takes for living."""
    return {
        node["raylet"]["nodeManagerAddress"]
        for node in get(f"{url}/nodes?view=summary")["data"]["summary"]
        if node["raylet"].get("state") == "ALIVE"
    }


@contextmanager
def local_head(url: str, port: int, resources: dict[str, float], variables: dict[str, str]) -> Iterator[None]:
    """`ray start --head` on this machine, its dashboard at `url`, with a home and a temporary folder of its own."""
    # short: Ray's sockets lie in it, and their paths may have 107 characters
    with suppress(OSError):
        assert not alive(url), f"a head that was left behind answers at {url}; end it ('ray stop')"
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
    ports = {
        "port": port, "dashboard-port": urlsplit(url).port,
        **{f"{name}-port": free_port() for name in ("ray-client-server", "dashboard-agent-listen", "metrics-export")},
    }
    command = [
        BIN / "ray", "start", "--head", "--block", "--num-cpus=2", *SPARE, f"--resources={json.dumps(resources)}",
        f"--temp-dir={folder / 'ray'}", *(f"--{name}={number}" for name, number in ports.items()),
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment(folder / "home", **variables), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait("a head on this machine, and its node", lambda: alive(url), process, (folder / "log").read_text)
        yield
    finally:
        process.send_signal(signal.SIGTERM)  # ends the node's processes one by one
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


class Host:
    """A namespace with one cable. `boot` starts its Ray node over and over, as a service manager does; `switch_off`
    kills all that runs in it.
    """

    def __init__(
        self, name: str, number: int, folder: Path, head: bool, resources: dict[str, float], cpus: int,
        variables: dict[str, str],
    ):
        self.name, self.address, self.cable = f"pi-{name}", f"{SUBNET}.{number}", f"pi{name}"
        join = "--head --port=6379 --dashboard-host=0.0.0.0" if head else f"--address={SUBNET}.1:6379"
        start = (
            f"{BIN}/ray start {join} --block --node-ip-address={self.address} --temp-dir={folder / name} "
            f"--num-cpus={cpus} {' '.join(SPARE)} --resources='{json.dumps(resources)}'"
        )
        self.command = f"while :; do {start}; sleep 1; done"
        self.folder, self.environment = folder, environment(folder / f"{name}-home", **FAST, **variables)
        self.process: subprocess.Popen | None = None

    def connect(self) -> None:
        for command in (
            f"netns add {self.name}", f"link add {self.cable} type veth peer name eth0 netns {self.name}",
            f"link set {self.cable} master pibridge up",
            f"-n {self.name} addr add {self.address}/24 dev eth0", f"-n {self.name} link set eth0 up",
            f"-n {self.name} link set lo up",
        ):  # fmt: skip
            ip(command)

    def boot(self) -> None:
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "bash", "-c", self.command], env=self.environment, stdout=log,
                stderr=log, start_new_session=True,
            )

    def processes(self) -> dict[int, str]:
        """Process id -> command line of all that runs in the namespace."""
        found = {}
        for pid in map(int, ip(f"netns pids {self.name}").split()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
        return found

    def switch_off(self) -> None:
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.process:
            self.process.wait()

    def cut(self) -> None:
        ip(f"link set {self.cable} down")

    def heal(self) -> None:
        ip(f"link set {self.cable} up")


@contextmanager
def network(**nodes: dict[str, Any]) -> Iterator[dict[str, Host]]:
    """Hosts by their names, connected but not booted; the first is the head. All that was made is removed in the
    end.
    """
    if os.geteuid() or not shutil.which("ip"):
        raise AssertionError(
            "this test makes network namespaces: run it as root on Linux, with iproute2 installed (apt-get install "
            "iproute2)"
        )
    # short: Ray's sockets lie in it, and their paths may have 107 characters
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
    hosts = {
        name: Host(name, number, folder, number == 1, **node)
        for number, (name, node) in enumerate(nodes.items(), start=1)
    }
    remove(hosts)
    try:
        for command in (
            "link add pibridge type bridge", f"addr add {SUBNET}.254/24 dev pibridge", "link set pibridge up",
        ):
            ip(command)
        for host in hosts.values():
            host.connect()
        yield hosts
    finally:
        remove(hosts)
        shutil.rmtree(folder, ignore_errors=True)


def remove(hosts: dict[str, Host]) -> None:
    """Also what a killed test left."""
    names = ip("netns list")
    for host in hosts.values():
        if host.name in names:
            host.switch_off()
            ip(f"netns del {host.name}")
    if "pibridge" in ip("link show type bridge"):
        ip("link del pibridge")


def ip(command: str) -> str:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(
            f"'ip {command}' failed, so there can be no hosts on this machine: {done.stderr.strip()}; run this test as "
            "root, with CAP_NET_ADMIN and CAP_SYS_ADMIN"
        )
    return done.stdout
