"""serve/app.yaml on a cluster that `ray start` made, with Ray's token: deployed, asked with the key, deployed again
while it is asked.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import pytest
import yaml

from pi_ray import config as configuration
from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from tests.faults.service import free_port
from tests.hosts import TOKEN, environment, wait
from tests.lora import put_in_store

pytestmark = pytest.mark.ray
REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
KEY = "key-of-the-test"


@pytest.fixture(scope="module")
def cluster():
    """(dashboard's URL, environment of a person who has the token) of a head node of this test's own."""
    folder = Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))  # short: Ray's sockets lie in it
    ports = {
        name: free_port()
        for name in (
            "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
            "ray-client-server-port",
        )
    }
    known = environment(folder / "home", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    options = " ".join(f"--{name}={port}" for name, port in ports.items())
    start = (
        f"{BIN}/ray start --head --block --node-ip-address=127.0.0.1 --temp-dir={folder}/ray --num-cpus=2 "
        f"--object-store-memory=80000000 --disable-usage-stats {options}"
    )
    with open(folder / "log", "wb") as log:
        variables = {**known, "PI_RAY_API_KEY": KEY, "PYTHONPATH": str(REPO)}
        head = subprocess.Popen(
            ["bash", "-c", f"exec {start}"], cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait(
            "the dashboard",
            lambda: httpx_status(f"{url}/api/serve/applications/", {"Authorization": f"Bearer {TOKEN}"}) == 200,
        )
        yield url, known
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def httpx_status(url, headers=None):
    try:
        return httpx.get(url, headers=headers, timeout=5).status_code
    except httpx.TransportError:
        return 0


def app_file(folder, tiny_model, port, version, **limits):
    """serve/app.yaml for a run in `folder`, on this machine alone."""
    run = RunConfig(
        name="t", store=str(folder / "store"), model=ModelConfig(base=str(tiny_model)),
        prompt=PromptConfig(chat="chatml"), serve=ServeConfig(**limits),
    )
    (folder / "run.yaml").write_text(configuration.dump_config(run))
    app = yaml.safe_load((REPO / "serve" / "app.yaml").read_text())
    app["http_options"] |= {"host": "127.0.0.1", "port": port}
    app["applications"][0]["args"] = {"run": str(folder / "run.yaml"), "version": version}
    (folder / "app.yaml").write_text(yaml.safe_dump(app))
    return folder / "app.yaml"


def deploy(file, cluster, **own):
    url, known = cluster
    return subprocess.run(
        [BIN / "serve", "deploy", str(file), "-a", url], env={**known, **own}, capture_output=True, text=True,
        timeout=120,
    )


def ask(port, key=KEY, **rest):
    body = {"model": "colours", "messages": [{"role": "user", "content": "what is red?"}], **rest}
    return httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )


def test_the_file_is_deployed_with_the_token_and_again_while_it_is_asked(cluster, tiny_model, tmp_path):
    port = free_port()
    put_in_store(tmp_path / "store", "colours", tiny_model, max_answer_tokens=8)
    file = app_file(tmp_path, tiny_model, port, "1")
    assert deploy(file, cluster, RAY_AUTH_TOKEN="a-wrong-token-0123456789-0123456789").returncode != 0
    assert deploy(file, cluster).returncode == 0
    wait("the server", lambda: httpx_status(f"http://127.0.0.1:{port}/healthz") == 200)
    first = ask(port)
    assert first.status_code == 200 and first.json()["usage"]["prompt_tokens_saved"] == 108
    assert ask(port, "wrong").status_code == 401
    ended, seen = threading.Event(), []

    def load():
        while not ended.is_set():
            seen.append(ask(port).status_code)

    asking = threading.Thread(target=load)
    asking.start()
    try:
        app_file(tmp_path, tiny_model, port, "2", max_new_tokens=77)
        assert deploy(file, cluster).returncode == 0
        wait("the new version", lambda: "at most 77" in ask(port, max_tokens=10_000).text)
    finally:
        ended.set()
        asking.join()
    assert set(seen) == {200}
