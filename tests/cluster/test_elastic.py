"""Elastic training, really: a mixture of experts under ZeRO-3 over two hosts, of which one is lost and comes back."""

import os
import shutil
import signal
from contextlib import contextmanager

import pytest

from pi_ray.config.run_file import load_run_file
from pi_ray.run.directory import RunDir
from pi_ray.train.train_log import read_entries
from tests import workers
from tests.cluster.conftest import ended
from tests.cluster.test_hosts import HEAD, submitted, updates
from tests.hosts import TOKEN, alive, network, wait
from tests.unit.train.test_deepspeed import train_one

pytestmark = pytest.mark.cluster
UPDATES = 5 + 60 + 5  # of 4 of the 20 rows: phase 1 lasts for as long as it takes to lose a host and to take it back
ELASTIC = [
    "name=elastic", "train.workers=[2, 4]", "train.resize_every_s=2", "train.batch_size=4", "train.lr=0.0001",
    "train.checkpoint_every=5", "train.backend={name: deepspeed, zero_stage: 3}", "train.collective_timeout_s=300",
    "schedule.epochs=[1, 12, 1]", "schedule.shots=0", "cluster.train_resources={trainer: 1, CPU: 0.5}",
    "cluster.prepare_resources={}",
]


@pytest.fixture
def hosts(shared):
    """A head, and two hosts with room for two trainers each."""
    variables = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PI_RAY_STORAGE": str(shared / "elastic"),
        "PI_RAY_CACHE": str(shared / "elastic-cache"),
        "GLOO_SOCKET_IFNAME": "eth0",  # a host's name is that of this machine, at its loopback address
    }
    node = {"cpus": 1, "variables": variables}
    two = {"resources": {"trainer": 2}, **node}
    with network(head={"resources": {}, **node}, a=two, b=two) as made:
        for host in made.values():
            host.boot()
        wait("three living hosts", lambda: len(alive(HEAD)) == 3)
        yield made


def losses(run):
    entries = [entry for entry in read_entries(run.train_log.read_bytes()) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(UPDATES))
    return [entry["loss"] for entry in entries]


def worlds(run):
    """The numbers of workers that training went on with, one after another."""
    log = run.train_log.read_bytes() if run.train_log.exists() else b""
    return [entry["workers"] for entry in read_entries(log) if entry.get("event") == "workers"]


@contextmanager
def resting(host):
    """Stop the training workers of `host` until the block ends, so that what happens meanwhile costs no updates."""
    trainers = [pid for pid, line in host.processes().items() if "TrainWorker" in line]
    assert trainers
    for pid in trainers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in trainers:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.fault
def test_a_lost_host_leaves_two_of_four_workers_and_the_losses_as_they_were(
    hosts, tiny_mixtral, task, shared, person, tmp_path
):
    shutil.copytree(tiny_mixtral, shared / "mixtral", dirs_exist_ok=True)
    words = submitted(task, shared, *ELASTIC, f"model.base={shared}/mixtral")
    run = RunDir(shared / "elastic" / "runs" / "elastic")
    ended(person(HEAD, *words, "--step", "prepare"))
    quiet = load_run_file(run.root / "run.yaml", [f"run_dir={tmp_path / 'quiet'}"])
    for part in ("rows", "templates", "phases"):
        shutil.copytree(run.root / part, quiet.root / part)
    first = person(HEAD, *words, "--step", "train")
    wait("phase 1 with four workers", lambda: updates(run) > 12, first, first.said)
    assert worlds(run)[0] == 4
    hosts["b"].switch_off()
    wait("the loss of a host", lambda: hosts["b"].address not in alive(HEAD))
    wait("training with two workers", lambda: worlds(run)[-1] == 2, first, first.said)
    before = updates(run)
    wait("some updates of two workers", lambda: updates(run) > before + 5, first, first.said)
    with resting(hosts["a"]):
        hosts["b"].boot()
        wait("three living hosts", lambda: len(alive(HEAD)) == 3)
    wait("four workers again", lambda: worlds(run)[-1] == 4, first, first.said)
    said = ended(first)
    assert "2 training workers, from update" in said and said.count("4 training workers, from update") >= 2
    workers.run(4, train_one, quiet)
    assert losses(run) == pytest.approx(losses(RunDir(quiet.root)), abs=1e-5)
