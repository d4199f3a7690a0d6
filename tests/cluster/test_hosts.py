"""Jobs on clusters, really: a head on this machine, and three hosts in network namespaces whose links are cut and which
die.

One run, sent from another folder, ends with the same adapter wherever it ran and whatever happened to the hosts.
"""

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.train.train_log import read_entries
from tests.cluster.conftest import LOCAL, TINY, ended
from tests.hosts import TOKEN, alive, get, network, wait

pytestmark = pytest.mark.cluster
HEAD = "http://10.231.7.1:8265"
EVERY = 50  # updates between checkpoints, as TINY has it


def submitted(task: Path, shared: Path, *more: str) -> list[str]:
    models = [f"model.base={shared}/model", f"compress.model={shared}/model"]
    return ["submit", str(task / "run.yaml"), *models, *TINY, *more]


def adapter_hash(run: RunDir) -> str:
    return verify_artifact(run.adapter(2))["files"]["adapter_model.safetensors"]["sha256"]


@pytest.fixture
def quiet(head, task, shared, person):
    """Hash of the adapter of a run to whose host nothing happens: `test_ctrl_c_...` has left one, unless this test runs
    alone.
    """
    run = RunDir(head / "runs" / "my-task")
    if not run.best.exists():
        ended(person(LOCAL, *submitted(task, shared)))
    return adapter_hash(run)


def test_ctrl_c_leaves_the_job_running_and_the_same_command_follows_it_to_its_end(head, task, shared, person):
    first = person(LOCAL, *submitted(task, shared))
    wait("the first updates", lambda: updates(RunDir(head / "runs" / "my-task")), first, first.said)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    assert (
        "The job goes on" in first.said()
        and "pi-ray logs pi-ray-my-task-1 --address http://127.0.0.1:8266" in first.said()
    )
    assert "running" in ended(person(LOCAL, "status", "my-task"))
    other = person(LOCAL, *submitted(task, shared, "train.lr=0.1"))
    assert other.wait(timeout=60) == 9 and "its settings or inputs are not these" in other.said()
    said = ended(person(LOCAL, *submitted(task, shared)))
    assert "pi-ray-my-task-1, which is going on already" in said and "phase 2 done" in said and "succeeded" in said
    assert f"Serve it there:  pi-ray submit {task}/run.yaml" in said and f"--step serve --address {LOCAL}" in said
    assert RunDir(head / "runs" / "my-task").best.exists() and (head / "store" / "my-task" / "latest.json").exists()


def test_submitted_again_after_its_end_the_run_goes_on_and_finds_all_done(head, task, shared, person):
    said = ended(person(LOCAL, *submitted(task, shared)))
    assert (
        "pi-ray-my-task-2, submitted to" in said
        and "nothing to do, the run directory is up to date" in said
        and "every phase has its adapter" in said
    )
    listed = ended(person(LOCAL, "status"))
    assert listed.index("pi-ray-my-task-2") < listed.index("pi-ray-my-task-1")
    assert "had ended already" in ended(person(LOCAL, "stop", "my-task"))
    assert "phase 2 done" in ended(person(LOCAL, "logs", "pi-ray-my-task-1"))


def test_a_failed_job_gives_its_own_sentence_and_exit_code(head, task, shared, person):
    process = person(
        LOCAL, *submitted(task, shared, "name=broken", "task.rows.train=1", "task.train=/nowhere/train.jsonl")
    )
    assert process.wait(timeout=120) == 3
    assert "/nowhere/train.jsonl: no such file" in process.said().splitlines()[-1]


def test_on_object_storage_a_node_that_lost_its_disk_finds_everything_again(head, task, shared, person, tmp_path):
    (tmp_path / "bucket").mkdir()
    words = submitted(
        task, shared, "name=mirrored", f"cluster.storage_path=file://{tmp_path}/bucket", "--step", "prepare"
    )
    ended(person(LOCAL, *words))
    for phase in range(3):
        verify_artifact(RunDir(tmp_path / "bucket" / "runs" / "mirrored").phase(phase))
    shutil.rmtree(head / "runs" / "mirrored")
    assert "nothing to do, the run directory is up to date" in ended(person(LOCAL, *words))


def test_only_what_run_yaml_names_travels_and_no_secret_does(head, task, shared, person):
    jobs = json.dumps(get(f"{LOCAL}/api/jobs/"))
    assert TOKEN not in jobs and "python -m pi_ray.cli.job run run.yaml" in jobs
    inputs = head / "runs" / "my-task" / "inputs"
    assert {path.name for path in inputs.iterdir()} == {
        "train.jsonl", "dev.jsonl", "test.jsonl", "template.md", "manifest.json",
    }
    for path in (head / "runs" / "my-task").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.fault
@pytest.mark.parametrize("headers, method, code", [
    ({}, "GET", 401),
    ({"Authorization": "Bearer wrong"}, "GET", 403),
    ({"Authorization": f"Bearer {TOKEN}", "User-Agent": "Mozilla/5.0", "Origin": "http://example.org"}, "POST", 405),
    ({"User-Agent": "Mozilla/5.0", "Sec-Fetch-Mode": "cors"}, "POST", 401),
])  # fmt: skip
def test_the_jobs_api_answers_nobody_without_the_token_and_no_browser(head, headers, method, code):
    body = json.dumps({"entrypoint": "touch /tmp/never"}).encode() if method == "POST" else None
    request = urllib.request.Request(
        f"{LOCAL}/api/jobs/", body, {"Content-Type": "application/json", **headers}, method=method
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == code


@pytest.mark.fault
def test_a_wrong_token_is_said_in_one_sentence_that_does_not_show_it(head, person):
    process = person(LOCAL, "status", RAY_AUTH_TOKEN="the-wrong-token-0123456789abcdef")
    assert process.wait(timeout=60) == 9
    assert "does not accept this token" in process.said() and "wrong-token" not in process.said()


@pytest.fixture
def hosts(shared):
    """A head, a CPU host and a host with the trainers' resource, booted."""
    variables = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PI_RAY_STORAGE": str(shared / "hosts"),
        "PI_RAY_CACHE": str(shared / "hosts-cache"),
    }
    node = {"cpus": 1, "variables": variables}
    with network(
        head={"resources": {}, **node}, cpu={"resources": {"preparer": 1}, **node},
        gpu={"resources": {"trainer": 1}, **node},
    ) as made:
        for host in made.values():
            host.boot()
        wait("three living hosts", lambda: len(alive(HEAD)) == 3)
        yield made


def updates(run: RunDir) -> int:
    """How far the log of training is: the number of its last update, 0 before there is one."""
    return max((entry["step"] for entry in read_entries(run.train_log.read_bytes()) if "loss" in entry), default=0)


@pytest.mark.fault
def test_hosts_that_die_and_links_that_are_cut_change_nothing_in_the_adapter(quiet, hosts, task, shared, person):
    run = RunDir(shared / "hosts" / "runs" / "my-task")
    first = person(HEAD, *submitted(task, shared))

    wait(
        "prepare at work on the CPU host",
        lambda: any("MapWorker" in line for line in hosts["cpu"].processes().values()), first, first.said,
    )
    assert not run.templates.exists()
    hosts["cpu"].switch_off()
    wait("the death of the CPU host", lambda: hosts["cpu"].address not in alive(HEAD))
    hosts["cpu"].boot()

    wait("phase 1 of training", lambda: '"phase": 1' in run.train_log.read_text(), first, first.said)
    hosts["gpu"].cut()
    wait("the loss of the training host", lambda: hosts["gpu"].address not in alive(HEAD))
    assert not run.best.exists(), "training ended before its host was lost"
    hosts["gpu"].heal()
    wait("its return", lambda: hosts["gpu"].address in alive(HEAD))
    before = updates(run)
    wait("training beyond the cut and a checkpoint", lambda: updates(run) > max(before, EVERY), first, first.said)

    hosts["head"].switch_off()
    wait(
        "a new start of the workers' hosts",
        lambda: not any("TrainWorker" in line for line in hosts["gpu"].processes().values()),
    )
    reached, returned = updates(run), time.time()
    assert not run.best.exists()
    hosts["head"].boot()
    wait("three living hosts again", lambda: len(alive(HEAD)) == 3)
    first.kill()
    said = ended(person(HEAD, *submitted(task, shared)))
    assert "pi-ray-my-task-1, submitted to" in said, "the new head knows no job"
    assert "up to date" in said and "succeeded" in said
    assert adapter_hash(run) == quiet
    again = min(
        entry["step"]
        for entry in read_entries(run.train_log.read_bytes())
        if "loss" in entry and entry["time"] > returned
    )
    assert again >= reached - EVERY > 0, "it goes on from the newest checkpoint"
