"""The server under test, in a process and a Ray of its own, and clients that record what happens to their requests."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from pi_ray import config as configuration
from pi_ray.config import RunConfig
from tests.faults.engines import FOLDER

REPO = Path(__file__).parents[2]
ENTRY = {
    "scripted_engine-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: scripted-engine\nVersion: 1\n",
    "scripted_engine-1.dist-info/entry_points.txt": (
        "[pi_ray.engine]\nscripted = tests.faults.engines:ScriptedEngine\nwatched = tests.faults.engines:watched\n"
    ),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _is_replica(pid: int) -> bool:
    """Whether the process lives and is a Serve replica. A process may end between the opening of its file and the
    reading of it, so no earlier look at the file spares the `except`.
    """
    try:
        return b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


class Service:
    """A server of `config`. `folder` is where its engine finds its troubles (engines.py). A context: at its end the
    process is stopped.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder = folder
        self.config = config
        self.url = f"http://127.0.0.1:{config.serve.port}"
        self.files = 0
        self.lines: queue.Queue[str] = queue.Queue()
        for name, text in ENTRY.items():  # an installed package that brings an engine, as registry.py finds it
            (folder / "plugin" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "plugin" / name).write_text(text)

    def __enter__(self) -> Service:
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", self.config.serve.api_key_env)}
        environment |= {
            "PYTHONPATH": f"{self.folder / 'plugin'}:{REPO}", FOLDER: str(self.folder), "PYTHONUNBUFFERED": "1",
        }
        self.log = open(self.folder / "server.log", "w")
        command = [sys.executable, "-m", "tests.faults.server", self._write(self.config)]
        self.process = subprocess.Popen(
            command, cwd=REPO, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.line("serving at", 180)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)

    def line(self, start: str, seconds: float) -> str:
        """The next line of the server that begins with `start`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=1)
            except queue.Empty:
                assert self.process.poll() is None, (
                    f"the server ended:\n{(self.folder / 'server.log').read_text()[-3000:]}"
                )
                assert time.monotonic() < deadline, f"the server said nothing that begins with {start!r}"
                continue
            if line.startswith(start):
                return line

    def _write(self, config: RunConfig) -> str:
        self.files += 1
        path = self.folder / f"run-{self.files}.yaml"
        path.write_text(configuration.dump_config(config))
        return str(path)

    def deploy(self, seconds: float = 300, **changes: Any) -> dict[str, str]:
        """A new version, with these config keys changed, over what is served; what came of it."""
        return self._tell(self._write(self.config.replace(**changes)), seconds)

    def metrics(self) -> str:
        """What Ray's agent shows to Prometheus."""
        return httpx.get(self._tell("metrics")["metrics"], timeout=60).text

    def _tell(self, line: str, seconds: float = 60) -> dict[str, str]:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.line("{", seconds))

    def replicas(self) -> list[int]:
        """Process ids of the Model replicas that live."""
        return [pid for p in (self.folder / "replicas").iterdir() if _is_replica(pid := int(p.name))]

    def active(self) -> int:
        """Requests in the engines of all replicas that live."""
        return sum(int((self.folder / "replicas" / str(pid)).read_text() or 0) for pid in self.replicas())

    def wait(self, seconds: float, condition: Callable[[], Any]) -> Any:
        """What `condition` gives as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "it did not come to that in time"
            time.sleep(0.02)
        return found

    def body(self, model: str, query: str, **rest: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": query}], "max_tokens": 60, **rest}

    def ask(self, query: str, model: str = "colours", **rest: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=self.body(model, query, **rest), timeout=120)

    async def send(self, client: httpx.AsyncClient, query: str, model: str = "colours", **rest: Any) -> httpx.Response:
        return await client.post(f"{self.url}/v1/chat/completions", json=self.body(model, query, **rest))

    async def stream(
        self, client: httpx.AsyncClient, query: str, model: str = "colours", begun: asyncio.Event | None = None,
        **rest: Any,
    ) -> Answer:
        """One streamed answer, whole or as far as it came."""
        body = self.body(model, query, stream=True, **rest)
        text, ended = "", False
        try:
            async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    return Answer(error=f"{response.status_code} {(await response.aread()).decode()}")
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            return Answer(text, error=f"in the stream: {event['error']['message']}")
                        text += "".join(c["delta"].get("content") or "" for c in event["choices"])
                        if begun and text:
                            begun.set()
        except httpx.TransportError as error:
            return Answer(text, error=f"connection: {error!r}")
        return Answer(
            text, error="" if ended else "the stream ended without [DONE] and without an error", lost=not ended
        )


class Answer:
    """`text` as far as it came; `error`: what a client was told, "" for a whole answer; `lost`: nothing told it that
    the answer is not whole.
    """

    def __init__(self, text: str = "", error: str = "", lost: bool = False):
        self.text, self.error, self.lost = text, error, lost

    def __repr__(self) -> str:
        return f"Answer({self.text!r}, error={self.error!r}, lost={self.lost})"
