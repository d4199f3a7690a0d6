"""FAULTS.md S1 to S4 against a real server with an engine whose answers are known and whose troubles are caused from here."""

import asyncio
import os
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from tests.faults.service import Service, free_port
from tests.lora import put_in_store

pytestmark = [pytest.mark.ray, pytest.mark.fault]
ONGOING, QUEUE, TIMEOUT_S = 2, 4, 15
LONG = 120  # seconds; more than enough on a busy machine


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    for seed, name in enumerate(("colours", "shapes")):
        put_in_store(folder / "store", name, tiny_model, seed)
    limits = ServeConfig(port=free_port(), engine="scripted", max_ongoing_requests=ONGOING, max_queued_requests=QUEUE, request_timeout_s=TIMEOUT_S)
    config = RunConfig(name="t", store=str(folder / "store"), model=ModelConfig(base=str(tiny_model)), prompt=PromptConfig(chat="chatml", query="Q: {query}"), serve=limits)
    with Service(folder, config) as running:
        yield running


@pytest.fixture(autouse=True)
def calm(service):
    """Each test begins and ends without trouble."""
    yield
    for name in ("hold", "sick", "broken"):
        (service.folder / name).unlink(missing_ok=True)
    if service.process.poll() is None:
        service.wait(LONG, lambda: answers(service) and service.active() == 0)


def answers(service):
    """Whether a request is answered rightly. A wrong answer fails at once, an error may pass."""
    try:
        reply = service.ask("are you there")
    except httpx.TransportError:
        return False
    if reply.status_code != 200:
        assert reply.status_code in (408, 429, 500, 503), reply.text
        return False
    assert reply.json()["choices"][0]["message"]["content"] == "colours are you there"
    return True


def memory(service):
    """Resident bytes of the server's replicas, ingress and proxy."""
    mark, total = f"PI_RAY_TEST_FOLDER={service.folder}".encode(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes() and b"Serve" in (process / "cmdline").read_bytes():
                total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


def clients(limit=200):
    return httpx.AsyncClient(timeout=LONG, limits=httpx.Limits(max_connections=limit))


def test_s1_a_burst_is_answered_or_told_at_once_to_come_back(service):
    (service.folder / "hold").touch()
    assert memory(service) > 0

    async def burst():
        replies = []

        async def one(http, i):
            replies.append((i, await service.send(http, f"hold {i}", "shapes" if i % 2 else "colours")))

        async with clients() as http:
            tasks = [asyncio.create_task(one(http, i)) for i in range(60)]
            while len(replies) < 60 - ONGOING - 2 * QUEUE and not all(t.done() for t in tasks):
                await asyncio.sleep(0.02)
            early = list(replies)
            (service.folder / "hold").unlink()
            await asyncio.gather(*tasks)
        return early, replies

    asyncio.run(burst())  # imports, connections, caches: what a first burst costs once
    (service.folder / "hold").touch()
    before = memory(service)
    early, replies = asyncio.run(burst())
    assert {reply.status_code for _, reply in replies} <= {200, 429, 408}
    assert {reply.status_code for _, reply in early} == {429}  # told while both slots were still taken: a refusal waits for nobody
    accepted = [(i, reply) for i, reply in replies if reply.status_code == 200]
    assert ONGOING <= len(accepted) <= ONGOING + 2 * QUEUE
    for i, reply in accepted:
        assert reply.json()["choices"][0]["message"]["content"] == f"{'shapes' if i % 2 else 'colours'} hold {i}"
    for _, reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1 and reply.json()["error"]["type"] == "rate_limit_error"
    assert memory(service) - before < 50e6


def test_s2_a_generation_beyond_the_time_limit_is_408_and_cancelled(service):
    (service.folder / "hold").touch()
    assert service.ask("hold for ever").status_code == 408
    service.wait(LONG, lambda: service.active() == 0)
    assert answers(service)


def test_s2_clients_that_leave_in_the_middle_free_their_slots(service):
    (service.folder / "hold").touch()

    async def leave():
        async with clients() as http:
            begun = [asyncio.Event() for _ in range(ONGOING)]
            tasks = [asyncio.create_task(service.stream(http, f"hold {i}", begun=event)) for i, event in enumerate(begun)]
            for event in begun:
                await event.wait()
            assert service.active() == ONGOING
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    began = time.monotonic()
    asyncio.run(leave())
    service.wait(LONG, lambda: service.active() == 0)
    assert answers(service)
    assert time.monotonic() - began < TIMEOUT_S  # long before the time limit would have ended them


def test_s3_a_killed_replica_is_replaced_and_its_clients_are_told(service):
    (service.folder / "hold").touch()
    [victim] = service.replicas()

    async def kill():
        async with clients() as http:
            begun = [asyncio.Event() for _ in range(ONGOING)]
            tasks = [asyncio.create_task(service.stream(http, f"hold {i}", begun=event)) for i, event in enumerate(begun)]
            for event in begun:
                await event.wait()
            os.kill(victim, signal.SIGKILL)
            return await asyncio.gather(*tasks)

    for answer in asyncio.run(kill()):
        assert answer.error and not answer.lost, answer
        assert "colours hold".startswith(answer.text)  # no wrong word before it
    service.wait(LONG, lambda: answers(service))
    assert victim not in service.replicas()


def test_s3_a_replica_whose_health_check_fails_is_replaced(service):
    [ill] = service.replicas()
    (service.folder / "sick").write_text(str(ill))
    service.wait(LONG, lambda: service.replicas() and ill not in service.replicas())
    service.wait(LONG, lambda: answers(service))


class Load:
    """Clients that ask one after the other, and what came of it."""

    def __init__(self, service, number=3):
        self.service, self.ended, self.failures, self.whole = service, False, [], 0
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(number)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended = True
        for thread in self.threads:
            thread.join()

    def _ask(self, client):
        count = 0
        while not self.ended:
            count += 1
            query, model = f"client {client} question {count}", ("colours", "shapes")[count % 2]
            try:
                reply = self.service.ask(query, model)
            except httpx.TransportError as error:
                self.failures.append(repr(error))
                continue
            if reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == f"{model} {query}":
                self.whole += 1
            else:
                self.failures.append(reply.text)


def test_s3_a_version_that_cannot_start_fails_and_the_old_one_keeps_serving(service):
    old = service.replicas()
    (service.folder / "broken").touch()
    with Load(service) as load:
        outcome = service.deploy(**{"serve.max_new_tokens": 500})
    assert re.search("fail|unhealthy", outcome["failed"], re.I)
    assert load.whole > 0 and load.failures == []
    assert service.replicas() == old
    (service.folder / "broken").unlink()
    assert "deployed" in service.deploy(**{"serve.max_new_tokens": 500})
    assert answers(service)


def test_s4_a_new_version_under_load_loses_no_request(service):
    old = service.replicas()
    with Load(service) as load:
        assert "deployed" in service.deploy(**{"serve.max_new_tokens": 400})
        service.wait(LONG, lambda: service.replicas() and not set(old) & set(service.replicas()))
        seen = load.whole
        service.wait(LONG, lambda: load.whole > seen + 5)
    assert load.failures == []


def test_the_last_replica_goes_when_nobody_asks_and_the_next_request_waits_for_a_new_one(service):
    assert "deployed" in service.deploy(**{"serve.min_replicas": 0, "serve.downscale_to_zero_delay_s": 1})
    service.wait(LONG, lambda: not service.replicas())
    assert service.ask("who is there").json()["choices"][0]["message"]["content"] == "colours who is there"
    assert len(service.replicas()) == 1
    service.wait(LONG, lambda: re.search(r"^ray_pi_ray_cold_start_seconds_count\S* [1-9]", service.metrics(), re.M))


def test_s4_sigterm_lets_the_requests_under_way_finish(service):
    """The last one: it ends the server."""
    (service.folder / "hold").touch()

    async def end():
        async with clients() as http:
            begun = [asyncio.Event() for _ in range(ONGOING)]
            tasks = [asyncio.create_task(service.stream(http, f"hold {i}", begun=event)) for i, event in enumerate(begun)]
            for event in begun:
                await event.wait()
            service.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(service.line, "shutting down", LONG)
            await asyncio.sleep(1)  # so that they end while the server waits for them
            (service.folder / "hold").unlink()
            return await asyncio.gather(*tasks)

    assert [(a.text, a.error) for a in asyncio.run(end())] == [("colours hold 0", ""), ("colours hold 1", "")]
    assert service.process.wait(timeout=LONG) == 0
