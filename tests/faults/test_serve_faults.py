"""FAULTS.md S1 to S5 against a real server with an engine whose answers are known and whose troubles are caused from
here.

Its times are those of a quiet machine: on a shared one they may be BUSY times as long.
"""

import asyncio
import functools
import json
import os
import re
import resource
import signal
import socket
import statistics
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.serve.http.connections import PER_CLIENT
from tests.faults.service import Service, free_port
from tests.lora import put_in_store

pytestmark = [pytest.mark.ray, pytest.mark.fault]
ONGOING, QUEUE, TIMEOUT_S = 2, 4, 15
LONG = 300  # seconds; more than enough on a busy machine
BUSY = 4
REFUSED_S, FREED_S, RECOVERED_S, MALFORMED_S = 0.5 * BUSY, 1 * BUSY, 15 * BUSY, 1 * BUSY


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    for seed, name in enumerate(("colours", "shapes")):
        put_in_store(folder / "store", name, tiny_model, seed)
    limits = ServeConfig(
        port=free_port(), engine="scripted", max_ongoing_requests=ONGOING, max_queued_requests=QUEUE,
        request_timeout_s=LONG,
    )
    config = RunConfig(
        name="t", store=str(folder / "store"), model=ModelConfig(base=str(tiny_model)),
        prompt=PromptConfig(chat="chatml", query="Q: {query}"), serve=limits,
    )
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


def latency(service):
    """Median seconds of a request on the idle server."""
    times = []
    for i in range(15):
        began = time.monotonic()
        assert service.ask(f"how long {i}").status_code == 200
        times.append(time.monotonic() - began)
    return statistics.median(times)


def clients(limit=200):
    return httpx.AsyncClient(timeout=LONG, limits=httpx.Limits(max_connections=limit))


def test_s1_a_burst_is_answered_or_told_at_once_to_come_back(service):
    (service.folder / "hold").touch()
    assert memory(service) > 0

    async def burst():
        replies, refused = [], []

        async def one(http, i):
            began = time.monotonic()
            replies.append((i, reply := await service.send(http, f"hold {i}", "shapes" if i % 2 else "colours")))
            if reply.status_code == 429:
                refused.append(time.monotonic() - began)

        async with clients() as http:
            tasks = [asyncio.create_task(one(http, i)) for i in range(60)]
            while len(replies) < 60 - ONGOING - 2 * QUEUE and not all(t.done() for t in tasks):
                await asyncio.sleep(0.02)
            early = list(replies)
            (service.folder / "hold").unlink()
            await asyncio.gather(*tasks)
        return early, replies, statistics.median(refused)

    asyncio.run(burst())  # imports, connections, caches: what a first burst costs once
    before, quiet = memory(service), latency(service)
    (service.folder / "hold").touch()
    early, replies, refused_s = asyncio.run(burst())
    assert {reply.status_code for _, reply in replies} <= {200, 429, 408}
    # told while both slots were still taken: a refusal waits for nobody
    assert {reply.status_code for _, reply in early} == {429}
    accepted = [(i, reply) for i, reply in replies if reply.status_code == 200]
    assert ONGOING <= len(accepted) <= ONGOING + 2 * QUEUE
    for i, reply in accepted:
        assert reply.json()["choices"][0]["message"]["content"] == f"{'shapes' if i % 2 else 'colours'} hold {i}"
    for _, reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1 and reply.json()["error"]["type"] == "rate_limit_error"
    assert memory(service) - before < 50e6
    assert refused_s < REFUSED_S
    assert latency(service) < 1.2 * BUSY * quiet


def test_as_many_answers_at_once_as_an_idle_server_has_places_for_and_no_more(service):
    def ask(n):
        return service.ask("several", n=n, max_tokens=20)

    # they come at once, and Serve may take the last for one too many: that is 429
    service.wait(LONG, lambda: ask(ONGOING + QUEUE).status_code == 200)
    assert ask(ONGOING + QUEUE + 1).status_code == 400


def freed(service, count=0):
    """Seconds until no more than `count` requests are in the engine."""
    began = time.monotonic()
    service.wait(LONG, lambda: service.active() <= count)
    return time.monotonic() - began


def test_s2_a_generation_beyond_the_time_limit_is_408_and_cancelled(service):
    old = service.replicas()
    assert "deployed" in service.deploy(**{"serve.request_timeout_s": TIMEOUT_S})
    service.wait(LONG, lambda: service.replicas() and not set(old) & set(service.replicas()))
    (service.folder / "hold").touch()
    assert service.ask("hold for ever").status_code == 408
    assert freed(service) < FREED_S
    assert answers(service)


def test_s2_clients_that_leave_in_the_middle_free_their_slots(service):
    (service.folder / "hold").touch()

    async def leave():
        async with clients() as http:
            begun = [asyncio.Event() for _ in range(ONGOING)]
            tasks = [
                asyncio.create_task(service.stream(http, f"hold {i}", begun=event)) for i, event in enumerate(begun)
            ]
            for event in begun:
                await event.wait()
            assert service.active() == ONGOING
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave())
    assert freed(service) < FREED_S < TIMEOUT_S
    assert answers(service)


def test_s2_a_client_that_leaves_before_its_whole_answer_frees_its_slot(service):
    (service.folder / "hold").touch()

    async def leave():
        async with clients() as http:
            task = asyncio.create_task(service.send(http, "hold whole"))
            await asyncio.to_thread(service.wait, LONG, lambda: service.active() == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert freed(service) < FREED_S < TIMEOUT_S
    assert answers(service)


@pytest.mark.parametrize(
    "body",
    [b"x" * (100 << 20), b"\xff\xfe", b'{"messages": ' * 9_000, b'{"model": "colours", "messages": [], "n": 1000000}'],
    ids=["100 MB", "UTF-8", "deep", "n"],
)
def test_s5_a_malformed_body_is_refused_through_the_proxy_in_no_time(service, body):
    before, began = memory(service), time.monotonic()
    reply = httpx.post(
        f"{service.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, timeout=LONG
    )
    assert time.monotonic() - began < MALFORMED_S
    assert (
        reply.status_code == (413 if len(body) > 1 << 20 else 400)
        and reply.json()["error"]["type"] == "invalid_request_error"
    )
    assert memory(service) - before < 50e6
    assert answers(service)


HALF_BODY = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"


@pytest.mark.parametrize("addresses", [1, 3], ids=["of one client", "of three clients"])
def test_1100_half_bodies_do_not_hold_an_honest_request(service, addresses):
    quiet, many = latency(service), 1_100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * many)), hard))
    with ExitStack() as sockets:
        sockets.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        held = []
        for number in range(many):
            source = f"127.0.1.{1 + number % addresses}", 0
            held.append(socket.create_connection(("127.0.0.1", service.config.serve.port), source_address=source))
            sockets.enter_context(held[-1])
            with suppress(OSError):  # closed, since its client has too many
                held[-1].sendall(HALF_BODY)
        assert latency(service) < 1.2 * BUSY * quiet
        alive = [client for client in held if is_open(client)]
        assert len(alive) == (PER_CLIENT if addresses == 1 else many)
    assert answers(service)


def is_open(client):
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_a_flood_of_empty_messages_holds_others_little_longer_than_one_message_of_that_size(service):
    """Each took 4.4 s, a hundred times one message, where messages got their place in the chat format unbounded."""
    user = {"role": "user", "content": ""}
    many = {"model": "colours", "messages": [user] * (1_040_000 // (len(json.dumps(user)) + 2))}
    text = "x" * (len(json.dumps(many)) - 200)
    one = {"model": "colours", "messages": [{**user, "content": text}], "n": 1_000_000}  # refused as early

    async def beside(flood, http):
        """Seconds of an honest request beside six of a flood."""
        content, kind = json.dumps(flood), {"Content-Type": "application/json"}
        post = functools.partial(http.post, f"{service.url}/v1/chat/completions", content=content, headers=kind)
        floods = [asyncio.create_task(post()) for _ in range(6)]
        await asyncio.sleep(0.02)
        began = time.monotonic()
        assert (await service.send(http, "are you there")).status_code == 200
        seconds = time.monotonic() - began
        assert {reply.status_code for reply in await asyncio.gather(*floods)} == {400}
        return seconds

    async def rounds():
        async with clients() as http:
            return [[await beside(flood, http) for flood in (many, one)] for _ in range(5)]

    of_many, of_one = zip(*asyncio.run(rounds()), strict=True)
    print(f"{of_many} beside many empty messages, {of_one} beside one message of the same size")
    assert statistics.median(of_many) < 5 * BUSY * statistics.median(of_one)


def test_s3_a_killed_replica_is_replaced_and_its_clients_are_told(service):
    (service.folder / "hold").touch()
    [victim] = service.replicas()

    async def kill():
        async with clients() as http:
            begun = [asyncio.Event() for _ in range(ONGOING)]
            tasks = [
                asyncio.create_task(service.stream(http, f"hold {i}", begun=event)) for i, event in enumerate(begun)
            ]
            for event in begun:
                await event.wait()
            os.kill(victim, signal.SIGKILL)
            return await asyncio.gather(*tasks), time.monotonic()

    told, began = asyncio.run(kill())
    for answer in told:
        assert answer.error and not answer.lost, answer
        assert "colours hold".startswith(answer.text)  # no wrong word before it
    service.wait(LONG, lambda: answers(service))
    assert time.monotonic() - began < RECOVERED_S
    assert victim not in service.replicas()


def test_s3_a_replica_whose_health_check_fails_is_replaced(service):
    [ill], began = service.replicas(), time.monotonic()
    (service.folder / "sick").write_text(str(ill))
    service.wait(LONG, lambda: service.replicas() and ill not in service.replicas())
    service.wait(LONG, lambda: answers(service))
    assert time.monotonic() - began < RECOVERED_S


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


def test_another_replica_comes_when_there_are_too_many_requests_for_one(service):
    assert "deployed" in service.deploy(**{"serve.max_replicas": 2, "serve.upscale_delay_s": 0})
    service.wait(LONG, lambda: len(service.replicas()) == 1 and answers(service))
    (service.folder / "hold").touch()

    async def many():
        async with clients() as http:
            tasks = [asyncio.create_task(service.send(http, f"hold {i}")) for i in range(2 * ONGOING)]
            await asyncio.to_thread(service.wait, LONG, lambda: service.active() == 2 * ONGOING)
            (service.folder / "hold").unlink()
            return await asyncio.gather(*tasks)

    assert [reply.json()["choices"][0]["message"]["content"] for reply in asyncio.run(many())] == [
        f"colours hold {i}" for i in range(2 * ONGOING)
    ]
    assert len(service.replicas()) == 2


def test_s4_sigterm_lets_the_requests_under_way_finish(service):
    """The last one: it ends the server."""
    (service.folder / "hold").touch()

    async def end():
        async with clients() as http:
            begun = [asyncio.Event() for _ in range(ONGOING)]
            tasks = [
                asyncio.create_task(service.stream(http, f"hold {i}", begun=event)) for i, event in enumerate(begun)
            ]
            for event in begun:
                await event.wait()
            service.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(service.line, "shutting down", LONG)
            await asyncio.sleep(1)  # so that they end while the server waits for them
            (service.folder / "hold").unlink()
            return await asyncio.gather(*tasks)

    assert [(a.text, a.error) for a in asyncio.run(end())] == [("colours hold 0", ""), ("colours hold 1", "")]
    assert service.process.wait(timeout=LONG) == 0
