"""What is set, and said, where HAProxy stands before Ray Serve."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private import constants

from pi_ray.cluster import haproxy
from tests.conftest import unset


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_nothing_is_set_where_it_is_not_wanted(monkeypatch, value):
    unset(monkeypatch, haproxy.SWITCH)
    if value:
        monkeypatch.setenv(haproxy.SWITCH, value)
    assert haproxy.private_files() == {} and haproxy.describe_risks() == ""


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
    assert [name for name in (haproxy.SWITCH, *haproxy.FILES, *haproxy.PORTS) if not hasattr(constants, name)] == []
