"""The steps of jobs/ through Ray's own `ray job submit`, each a job of its own, from a checkout with a task in it; at
last a server that asks for its key.
"""

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pi_ray.config import RunConfig, dump_config, run_file
from pi_ray.run.directory import RunDir
from tests.cluster.conftest import KEY, LOCAL, TINY, ended
from tests.faults.service import free_port
from tests.hosts import TOKEN, wait

pytestmark = pytest.mark.cluster
REPO = Path(__file__).parents[2]


@pytest.fixture
def checkout(task, shared, tmp_path) -> tuple[Path, int]:
    """(a folder with pi_ray, jobs and my-task, the port of its server). The task's run.yaml holds all settings, so that
    the commands are plain.
    """
    folder, port = tmp_path / "checkout", free_port()
    for name in ("pi_ray", "jobs"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(task, folder / "my-task")
    own = [
        "name=by-steps", f"model.base={shared}/model", f"compress.model={shared}/model", *TINY, "schedule.epochs=1",
        f"serve.port={port}",
    ]
    path = folder / "my-task" / "run.yaml"
    path.write_text(dump_config(run_file.validate_yaml(RunConfig, run_file.read_run_file(path), str(path), own)))
    return folder, port


def ask(port: int, key: str) -> tuple[int, dict]:
    body = json.dumps({"model": "by-steps", "messages": [{"role": "user", "content": "what about my login?"}]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body,
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, {}


def healthy(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
        return answer.status == 200


def gone(port: int) -> bool:
    try:
        return not healthy(port)
    except OSError:
        return True


def test_each_step_is_a_job_and_the_server_answers_with_its_key(head, checkout, person):
    folder, port = checkout
    run = RunDir(head / "runs" / "by-steps")

    def submit(step: str, *options: str):
        return person(
            LOCAL, "job", "submit", *options, "--working-dir", str(folder), "--", "python", f"jobs/{step}.py",
            "my-task/run.yaml", program="ray",
        )

    said = ended(submit("prepare"))
    assert "succeeded" in said and run.templates.exists() and not run.adapter(0).exists()
    said += ended(submit("train"))
    assert run.best.exists() and not run.evaluation.exists()
    said += ended(submit("evaluate"))
    assert run.evaluation.exists() and not (head / "store" / "by-steps").exists()
    last = ended(submit("main"))
    assert (
        "up to date" in last
        and "every phase has its adapter" in last
        and (head / "store" / "by-steps" / "latest.json").exists()
    )

    ended(submit("serve", "--no-wait", "--submission-id", "server"))
    wait("the server", lambda: healthy(port))
    status, answer = ask(port, KEY)
    assert status == 200 and answer["model"] == "by-steps" and answer["usage"]["completion_tokens"] > 0
    assert ask(port, "wrong")[0] == ask(port, "")[0] == 401
    ended(person(LOCAL, "job", "stop", "server", program="ray"))
    wait("its end", lambda: gone(port))
    said += last + ended(person(LOCAL, "job", "logs", "server", program="ray"))
    assert "serving at" in said and TOKEN not in said and KEY not in said
