"""Limits of connections on uvicorn's own protocol class, with a transport and a clock that stand still."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve._private import constants
from uvicorn.config import Config
from uvicorn.protocols.http import auto
from uvicorn.server import ServerState

from pi_ray.serve.http import connections
from pi_ray.serve.http.connections import BODY_S, HEADERS_S, VARIABLE

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"


class Transport(asyncio.Transport):
    aborted = closed = False
    written = b""

    def __init__(self, address):
        super().__init__({"peername": (address, 1), "sockname": ("127.0.0.1", 8000)})

    def abort(self):
        self.aborted = True

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def set_protocol(self, protocol):
        raise AssertionError("another protocol class has no limits")

    def is_closing(self):
        return False


class Loop:
    """Keeps the timers that were set; tasks are not run."""

    def __init__(self):
        self.timers = []

    def call_later(self, seconds, callback, *arguments):
        timer = SimpleNamespace(seconds=seconds, fire=lambda: callback(*arguments), cancelled=False)
        timer.cancel = lambda: setattr(timer, "cancelled", True)
        self.timers.append(timer)
        return timer

    def create_task(self, coroutine, **options):
        coroutine.close()
        return asyncio.Future(loop=self)

    def get_debug(self):
        return False

    def pending(self):
        return [timer for timer in self.timers if not timer.cancelled]


@pytest.fixture
def connect(monkeypatch):
    """A function that makes a connection from an address -> (protocol, transport, loop)."""
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    monkeypatch.setattr(connections, "_open", connections.Counter())
    monkeypatch.setenv("PI_RAY_CONNECTIONS_PER_CLIENT", "3")
    assert connections.limit_connections() == [] == connections.limit_connections()

    def make(address="10.0.0.1"):
        loop, transport = Loop(), Transport(address)
        protocol = auto.AutoHTTPProtocol(Config(lambda scope: None, http="auto"), ServerState(), {}, loop)
        protocol.connection_made(transport)
        return protocol, transport, loop

    return make


@pytest.mark.fault
@pytest.mark.parametrize(
    ("sent", "seconds"), [(b"", HEADERS_S), (HEAD[:30], HEADERS_S), (HEAD, BODY_S), (HEAD + b"ab", BODY_S)]
)
def test_a_request_that_does_not_arrive_in_time_loses_its_connection(connect, sent, seconds):
    protocol, transport, loop = connect()
    for byte in sent:  # one at a time, which does not set the clock back
        protocol.data_received(bytes([byte]))
    [timer] = loop.pending()
    assert timer.seconds == seconds and not transport.aborted
    timer.fire()
    assert transport.aborted


def test_a_whole_request_has_no_limit_here_and_the_next_one_on_the_connection_has(connect):
    protocol, _, loop = connect()
    protocol.data_received(HEAD + b"body")
    assert loop.pending() == []
    protocol.cycle.response_complete = True
    protocol.data_received(HEAD[:10])
    assert [timer.seconds for timer in loop.pending()] == [HEADERS_S]
    protocol.connection_lost(None)
    assert loop.pending() == []


@pytest.mark.fault
def test_connections_of_one_client_are_bounded_and_others_are_let_in(connect):
    made = [connect() for _ in range(5)]
    assert [transport.aborted for _, transport, _ in made] == [False] * 3 + [True] * 2
    assert not connect("10.0.0.2")[1].aborted
    for protocol, *_ in made[2:]:
        protocol.connection_lost(None)
    assert not connect()[1].aborted and connect()[1].aborted


@pytest.mark.fault
def test_a_request_for_a_websocket_is_400_and_its_connection_counts_no_longer(connect):
    upgrade = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for _ in range(4):  # one more than a client may have at once
        protocol, transport, loop = connect()
        protocol.data_received(upgrade)
        assert transport.written.startswith(b"HTTP/1.1 400 ") and transport.closed
        protocol.connection_lost(None)
        assert loop.pending() == [] and not connections._open


@pytest.mark.parametrize("module, name, step", [
    (auto, "AutoHTTPProtocol", connections.limit_connections), (constants, VARIABLE, connections.check_callback),
])  # fmt: skip
def test_limits_that_cannot_be_set_are_said(module, name, step, monkeypatch, caplog):
    step()
    assert not caplog.text
    monkeypatch.delattr(module, name)
    step()
    assert "connections of clients have no limits" in caplog.text
