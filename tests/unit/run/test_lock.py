"""One process at a time prepares a run, and a lock never outlives its process."""

import subprocess
import sys

import pytest

from pi_ray.data import prepare
from pi_ray.errors import StorageError
from pi_ray.run import lock
from pi_ray.run.lock import run_lock
from tests.prepared import tiny_config

HOLD = """
import pathlib, sys
from pi_ray.run.lock import run_lock
with run_lock(pathlib.Path(sys.argv[1]), "x"):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        yield process
        process.kill()


def test_a_second_preparation_in_one_directory_is_refused(other, tmp_path):
    with pytest.raises(StorageError, match="another process is preparing this run; wait for it") as refused:
        prepare.prepare(tiny_config("no-such-model", tmp_path))
    assert str(tmp_path) in str(refused.value)


def test_a_killed_process_leaves_no_lock(other, tmp_path):
    other.kill()
    other.wait()
    with run_lock(tmp_path, "x"), pytest.raises(StorageError, match="another process x"), run_lock(tmp_path, "x"):
        pass
    with run_lock(tmp_path, "x"):
        pass


def test_on_a_disk_without_locks_work_goes_on(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(next(iter(lock.NO_LOCKS)), "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with run_lock(tmp_path, "x"):
        pass
