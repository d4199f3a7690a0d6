"""What tests of clusters share: a person's folder and shell, storage, and a head on this machine."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pi_ray.cli.init import write_task
from tests.hosts import BIN, TOKEN, environment, local_head

LOCAL = "http://127.0.0.1:8266"
KEY = "the-key-of-this-tests-server"
QUEUES = {"billing": "Q7", "login": "Q2", "parcel": "Q5", "other": "Q9"}
TINY = [  # phase 1 lasts for as long as it takes to notice that a host is lost, some 10 s
    "train.workers=1",
    "train.batch_size=2",
    "train.lora.rank=4",
    "train.checkpoint_every=50",
    "train.backend.name=ddp",
    "train.max_failures=8",
    "schedule.epochs=[4, 100, 4]",
    "evaluate.baseline=false",
    "evaluate.probe=false",
    "evaluate.latency_rows=1",
    "evaluate.max_new_tokens=4",
    "cluster.train_resources={trainer: 1, CPU: 1}",
    "cluster.prepare_resources={preparer: 1}",
    "cluster.evaluate_resources={preparer: 1}",
]


@pytest.fixture(scope="package")
def task(tmp_path_factory) -> Path:
    """A person's folder: run.yaml, template and rows, and things that must stay at home."""
    folder = tmp_path_factory.mktemp("person") / "my-task"
    write_task(folder)
    for split, rows in (("train", 20), ("dev", 4), ("test", 4)):
        lines = [
            json.dumps({"query": f"{split} case {i}: what about my {queue}?", "answer": f"{code} {i % 3}"})
            for i, (queue, code) in enumerate(list(QUEUES.items()) * 5)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:rows]) + "\n")
    (folder / "runs").mkdir()
    (folder / "runs" / "big").write_bytes(bytes(1 << 20))
    return folder


@pytest.fixture(scope="package")
def shared(tmp_path_factory, tiny_model):
    """Storage that every node sees, with the base model."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(tiny_model, folder / "model")
    return folder


@pytest.fixture
def person(task, shared, tmp_path):
    """`person(LOCAL, "submit", ...)`: pi-ray, or another program, as typed into a shell in another folder. Returns the
    running process; "" unsets a variable.
    """
    started = []

    def typed(address: str, *words: str, program: str = "pi-ray", **own: str) -> subprocess.Popen:
        variables = (
            environment(tmp_path / "home", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_API_SERVER_ADDRESS=address)
            | own
        )
        variables = {name: value for name, value in variables.items() if value}
        path = tmp_path / f"said-{len(started)}"
        with open(path, "wb") as said:
            process = subprocess.Popen(
                [BIN / program, *words], cwd=tmp_path, env=variables, stdout=said, stderr=subprocess.STDOUT
            )
        process.said = path.read_text
        started.append(process)
        return process

    yield typed
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def ended(process: subprocess.Popen, seconds: float = 300) -> str:
    """What the process said, once it has ended well."""
    process.wait(timeout=seconds)
    assert process.returncode == 0, process.said()[-4000:]
    return process.said()


@pytest.fixture(scope="package")
def head(tmp_path_factory, shared):
    """A head on this machine that wants the token. Returns the folder of its storage."""
    storage = shared / "local"
    nodes = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PI_RAY_STORAGE": str(storage),
        "PI_RAY_CACHE": str(shared / "cache"), "PI_RAY_API_KEY": KEY,
    }
    with local_head(LOCAL, 6389, {"trainer": 1, "preparer": 1}, nodes):
        yield storage
