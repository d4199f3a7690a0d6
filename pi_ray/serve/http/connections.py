"""Connections of a node's HTTP proxy: bounded for each client, and closed when a request does not arrive in time.

Serve's proxies run uvicorn, which waits for ever for the rest of a request. Each proxy calls `limit_connections` before
it listens, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it: clusters that pi-ray starts, and those of
cluster/, have it in their environment.
"""

import asyncio
import logging
import os
from collections import Counter
from typing import Any

log = logging.getLogger("ray.serve")
VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
HEADERS_S = 10  # from the connection, or the first byte of a later request, to the end of its headers
BODY_S = 30  # from there to the end of the body
PER_CLIENT = 512  # connections at once from one address; PI_RAY_CONNECTIONS_PER_CLIENT sets another number
_open: Counter[str] = Counter()  # address -> connections


class ConnectionLimits:
    """A mixin for uvicorn's protocol classes, whose `cycle` is the present request."""

    cycle: Any
    loop: Any
    transport: Any
    send_400_response: Any
    per_client = PER_CLIENT
    _client = ""
    _phase = ""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        self._client = str((transport.get_extra_info("peername") or ("",))[0])
        _open[self._client] += 1
        if _open[self._client] > self.per_client:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)  # type: ignore[misc]
        self._set_timer(None)
        _open[self._client] -= 1
        if not _open[self._client]:
            del _open[self._client]

    def handle_websocket_upgrade(self, *_: Any) -> None:
        """Refuse: uvicorn would give the connection to another protocol class, which nothing bounds."""
        self.send_400_response("no WebSockets here")

    def _watch(self) -> None:
        """Start the time limit of what is awaited now: headers, then a body; the answer has limits of its own."""
        phase = self._awaited()
        if phase != self._phase:
            self._phase = phase
            self._set_timer({"headers": HEADERS_S, "body": BODY_S}.get(phase))

    def _awaited(self) -> str:
        if self.cycle is None or self.cycle.response_complete:
            return "headers"
        return "body" if self.cycle.more_body else "answer"

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.transport.abort) if seconds else None


def limit_connections() -> list[Any]:
    """Have this process's uvicorn make limited connections. Returns the middlewares for Serve's proxy: none."""
    try:
        from uvicorn.protocols.http import auto

        auto.AutoHTTPProtocol  # noqa: B018 (it is no part of uvicorn's interface)
    except (ImportError, AttributeError):
        log.warning("this uvicorn has no AutoHTTPProtocol: connections of clients have no limits")
        return []
    limits = {"per_client": int(os.environ.get("PI_RAY_CONNECTIONS_PER_CLIENT") or PER_CLIENT)}
    if not issubclass(auto.AutoHTTPProtocol, ConnectionLimits):
        limited: Any = type("LimitedProtocol", (ConnectionLimits, auto.AutoHTTPProtocol), limits)
        auto.AutoHTTPProtocol = limited
    return []


def check_callback() -> None:
    """Log a warning where this Ray Serve does not know the variable by which its proxies call `limit_connections`."""
    from ray.serve._private import constants

    if not hasattr(constants, VARIABLE):
        log.warning("this Ray Serve has no %s: connections of clients have no limits", VARIABLE)
