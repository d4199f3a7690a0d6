"""The server behind HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1): answers, refusals and clients that leave, and what it opens.

test_serve_faults.py can be run behind it too: RAY_SERVE_ENABLE_HA_PROXY=1 pytest tests/faults/test_serve_faults.py.
"""

import asyncio
import stat
import time
from pathlib import Path

import httpx
import psutil
import pytest

from pi_ray.cluster import haproxy
from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from tests.faults.service import Service, free_port
from tests.lora import put_in_store

pytestmark = [pytest.mark.ray, pytest.mark.fault]
LONG, TIMEOUT_S = 300, 15


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    put_in_store(folder / "store", "colours", tiny_model, 0)
    limits = ServeConfig(
        port=free_port(), engine="scripted", max_ongoing_requests=2, max_queued_requests=2, request_timeout_s=TIMEOUT_S,
    )
    config = RunConfig(
        name="t", store=str(folder / "store"), model=ModelConfig(base=str(tiny_model)),
        prompt=PromptConfig(chat="chatml", query="Q: {query}"), serve=limits,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(haproxy.SWITCH, "1")
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 s are few for HAProxy on a busy machine
        ports = {name: str(free_port()) for name in haproxy.PORTS}
        for name, port in ports.items():
            patch.setenv(name, port)
        with Service(folder, config) as running:
            running.statistics = set(ports.values())
            yield running


def proxies():
    """The HAProxy processes that live; one that was reloaded may still have connections to finish."""
    return [p for p in psutil.process_iter(["name"]) if p.info["name"] == "haproxy"]


def test_answers_come_whole_and_streamed(service):
    reply = service.ask("what is red?")
    assert reply.json()["choices"][0]["message"]["content"] == "colours what is red?"
    assert reply.headers["x-pi-ray-prompt"] == "internalised"

    async def stream():
        async with httpx.AsyncClient(timeout=LONG) as http:
            return await service.stream(http, "and blue?")

    assert asyncio.run(stream()).text == "colours and blue?"


def test_refusals_keep_their_status_and_their_form(service):
    url = f"{service.url}/v1/chat/completions"
    large = httpx.post(url, content=b"x" * (3 << 20), headers={"Content-Type": "application/json"}, timeout=LONG)
    foreign = httpx.get(f"{service.url}/v1/models", headers={"Host": "evil.example"}, timeout=LONG)
    unknown = service.ask("what is red?", model="none")
    assert [(r.status_code, r.json()["error"]["code"]) for r in (large, foreign, unknown)] == [
        (413, "body_too_large"), (403, "key_required"), (404, "model_not_found"),
    ]


def test_clients_that_leave_free_their_slots_at_the_latest_when_their_time_is_over(service):
    (service.folder / "hold").touch()

    async def leave():
        async with httpx.AsyncClient(timeout=LONG) as http:
            begun = asyncio.Event()
            tasks = [
                asyncio.create_task(service.stream(http, "hold streamed", begun=begun)),
                asyncio.create_task(service.send(http, "hold whole")),
            ]
            await begun.wait()
            await asyncio.to_thread(service.wait, LONG, lambda: service.active() == 2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave())
    began = time.monotonic()
    service.wait(LONG, lambda: service.active() == 0)
    assert time.monotonic() - began < TIMEOUT_S + 4, "HAProxy does not always see at once that a client left"
    (service.folder / "hold").unlink()


def test_it_listens_on_the_servers_address_and_on_the_two_ports_that_the_log_names(service):
    own = [p for p in proxies() if str(service.config.serve.port) in {str(c.laddr.port) for c in p.net_connections()}]
    [listening] = [[c.laddr for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN] for p in own][:1]
    assert {f"{a.ip}:{a.port}" for a in listening if str(a.port) not in service.statistics} == {
        f"127.0.0.1:{service.config.serve.port}"
    }
    assert service.statistics <= {str(a.port) for a in listening}
    assert all(port in (service.folder / "server.log").read_text() for port in service.statistics)


def test_no_other_user_reaches_the_socket_that_administers_it(service):
    sockets = {Path(c.laddr) for p in proxies() for c in p.net_connections("unix") if "pi-ray-ha-" in str(c.laddr)}
    assert sockets
    for path in sockets:
        folder = next(parent for parent in path.parents if parent.name.startswith("pi-ray-ha-"))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
