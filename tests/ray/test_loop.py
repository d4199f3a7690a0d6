"""Ray Train and DeepSpeed with two workers: the phases, and a killed run that ends where a quiet one does."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pi_ray.artifact import verify
from pi_ray.rundir import RunDir
from pi_ray.train.loop import is_trained, train
from tests.prepared import prepare_by_hand, tiny_config

pytestmark = pytest.mark.ray
TWO = {"train.workers": 2, "train.backend": {"name": "deepspeed", "zero_stage": 2}, "schedule.epochs": 4}


def adapter_hash(config):
    return verify(RunDir(config.root).adapter(2))["files"]["adapter_model.safetensors"]["sha256"]


@pytest.fixture(scope="module")
def quiet(tiny_model, tmp_path_factory, ray_local):
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("quiet"), **TWO)
    prepare_by_hand(config)
    seen = []
    train(config, seen.append)
    return config, seen


def test_two_deepspeed_workers_train_through_the_phases(quiet):
    config, seen = quiet
    assert is_trained(config)
    steps = [e for e in seen if "loss" in e]
    assert [e["step"] for e in steps] == list(range(36))
    assert sorted({e["phase"] for e in steps}) == [0, 1, 2]


def test_a_second_call_trains_nothing(quiet):
    config, _ = quiet
    seen = []
    train(config, seen.append)
    assert seen == []


@pytest.mark.fault
def test_killed_in_the_middle_of_phase_2_the_same_command_ends_with_the_same_adapter(quiet, tmp_path):
    """SIGKILL to the driver and its whole process group while phase 2 runs (the middle of the run), then the same command again."""
    quiet_config, _ = quiet
    config = quiet_config.replace(run_dir=str(tmp_path / "run"))
    prepare_by_hand(config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = (
        "import sys, pathlib; from pi_ray import cluster; from pi_ray.config import RunConfig; from pi_ray.train.loop import train\n"
        "cluster.connect(); train(RunConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "config.json")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    log = RunDir(config.root).train_log
    first = subprocess.Popen(command, start_new_session=True, env=environment)
    deadline = time.monotonic() + 120
    while not (log.exists() and sum('"phase": 2' in line and '"loss"' in line for line in log.read_text().splitlines()) >= 3):
        assert first.poll() is None and time.monotonic() < deadline, "the first run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not is_trained(config)
    done = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line][-1]
    assert 24 <= done < 35
    assert any(RunDir(config.root).checkpoints.glob("step-*"))
    subprocess.run(command, check=True, env=environment, timeout=180)
    assert adapter_hash(config) == adapter_hash(quiet_config)
