"""One process at a time works in a run directory, and a lock never outlives its process."""

import subprocess
import sys

import pytest

from pi_ray.answer.rows import make_answered_rows
from pi_ray.data import prepare
from pi_ray.errors import StorageError
from pi_ray.evaluate import evaluate
from pi_ray.run import lock
from pi_ray.run.artifact import temporary_path
from pi_ray.run.lock import run_lock
from pi_ray.train import launch
from tests.prepared import tiny_config

HOLD = """
import pathlib, sys
from pi_ray.run.lock import run_lock
with run_lock(pathlib.Path(sys.argv[1]), "is reading a book"):
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


def evaluate_run(config):
    class Answerer:
        def fingerprint(self, columns):
            return "new"

    evaluate.evaluate_run(config, columns=[None], answerer=Answerer())


@pytest.mark.parametrize("step", [
    prepare.prepare, launch.train, evaluate_run,
    lambda config: make_answered_rows(config, lambda _: True, print, lambda *_: None),
])  # fmt: skip
def test_a_second_step_in_one_directory_is_refused_and_told_what_goes_on(step, other, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "fingerprint_of", lambda config: "new")
    with pytest.raises(StorageError, match="another process is reading a book; wait for it") as refused:
        step(tiny_config("no-such-model", tmp_path))
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


@pytest.mark.fault
def test_what_a_killed_process_left_half_written_is_removed_by_the_next_one_and_nothing_before(other, tmp_path):
    half = temporary_path(tmp_path / "rows")
    half.mkdir()
    (half / "train.parquet").write_bytes(b"half")
    temporary_path(tmp_path / "rejects.jsonl").write_text("half")
    (tmp_path / "rows").mkdir()
    with pytest.raises(StorageError), run_lock(tmp_path, "is training this run"):
        pass
    assert len(list(tmp_path.iterdir())) == 4, "it may be work in progress of the process that has the lock"
    other.kill()
    other.wait()
    with run_lock(tmp_path, "is training this run"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "rows"]
