"""Half an hour of everything that happens to a server, all at once: is its memory flat and every answer right?

    python -m tests.bench.soak [--minutes 30] [--clients 6]

Streaming clients ask more adapters than a replica holds, so that cold ones are loaded and others go all the time; every
fifth answer is given up after its first words. Every 20 s a release changes which version of an adapter answers. Every
two minutes the younger of two replicas gets SIGKILL; the elder lives through it all, and its memory is what counts:
medians of the time after the first five minutes (a sixth of a shorter run) and of the last two (a fifteenth).

What may not happen: an answer that no version gives that answered while it was asked for; a stream that ends as if it
were whole and is not; a request that the server still counts when all clients are gone; memory that grew by more than
5%. The engine is the real one, on a tiny random model. Last line JSON; exit status 1 when something happened that may
not, or a part of the programme did not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.release import release_version
from tests.bench.report import header, last_line
from tests.conftest import tiny
from tests.faults.service import Service, free_port
from tests.lora import put_in_store

ADAPTERS, LOADED, QUERIES, TOKENS = 10, 4, 4, 32
VERSIONS = ("v0001", "v0002")
RELEASE_S, KILL_S, SAMPLE_S = 20.0, 120.0, 2.0
GROWTH = 0.05  # of the elder replica's memory, at most
OPEN = ("pi_ray_open_requests", "pi_ray_queued_requests", "pi_ray_engine_rows", "pi_ray_engine_waiting")


@dataclass
class Record:
    """What happened in a soak."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    cancelled: int = 0
    released: int = 0
    killed: int = 0
    left_open: float = 0.0  # requests that the server counts when all clients are gone
    told: Counter[str] = field(default_factory=Counter)  # errors that clients were told, by their first word
    memory: list[tuple[float, int]] = field(default_factory=list)  # (seconds, bytes) of the elder replica

    def growth(self, seconds: float) -> float:
        """Memory at the end of a run of so many seconds, over that after its first sixth, less 1."""
        early = [size for at, size in self.memory if seconds / 6 <= at < seconds / 6 + seconds / 15]
        late = [size for at, size in self.memory if at >= seconds - seconds / 15]
        return statistics.median(late) / statistics.median(early) - 1 if early and late else float("nan")

    def failures(self, seconds: float) -> list[str]:
        """What may not happen and did, or had to happen and did not."""
        growth = self.growth(seconds)
        found = [f"wrong: {line}" for line in self.wrong]
        if self.lost:
            found.append(f"{self.lost} streams ended early as if they were whole")
        if self.left_open:
            found.append(f"{self.left_open:.0f} requests are counted though no client is left")
        if not growth <= GROWTH:
            found.append(f"the elder replica's memory grew by {growth:.1%}")
        happened = ("right", "cancelled", "released", "killed")
        found += [f"nothing was {name}" for name in happened if not getattr(self, name)]
        return found + [f"clients were told {error}" for error in self.told if error in ("400", "404", "422", "500")]


class Soak:
    """The server's clients and troubles. `answers[(adapter, version, query)]` is what each version says alone."""

    def __init__(self, service: Service, store: Path, http: httpx.AsyncClient, seconds: float):
        self.service, self.store, self.http, self.seconds = service, store, http, seconds
        self.record, self.began = Record(), time.monotonic()
        self.answers: dict[tuple[str, str, str], str] = {}
        self.live: dict[str, list[tuple[float, str]]] = defaultdict(list)  # adapter -> (since, version)

    async def learn_answers(self) -> None:
        """Ask each version of each adapter each query, on the quiet server."""
        for adapter in range(ADAPTERS):
            name = f"adapter-{adapter}"
            for version in VERSIONS:
                for query in range(QUERIES):
                    text = f"question {query} about the number {query * 37}"
                    answer = await self.service.stream(self.http, text, f"{name}@{version}", max_tokens=TOKENS)
                    assert not answer.error, answer
                    self.answers[name, version, text] = answer.text
            release_version(AdapterStore(self.store), name, VERSIONS[0])
            self.live[name] = [(0.0, VERSIONS[0])]
        assert len(set(self.answers.values())) > len(self.answers) // 2, "the answers do not tell requests apart"
        self.began = time.monotonic()

    @property
    def over(self) -> bool:
        return time.monotonic() - self.began >= self.seconds

    async def run(self, clients: int) -> None:
        await asyncio.gather(
            *(self.ask(seed) for seed in range(clients)), self.release(), self.kill(), self.measure_memory(),
        )
        await asyncio.sleep(15)  # the gauges' period, and some
        text = await asyncio.to_thread(self.service.metrics)
        self.record.left_open = sum(sum(values_of(text, name, set(self.service.replicas()))) for name in OPEN)

    async def ask(self, seed: int) -> None:
        choose = random.Random(seed)
        while not self.over:
            name, _, query = choose.choice(sorted(self.answers))
            began = time.monotonic()
            if choose.random() < 0.2:
                await self.give_up(query, name, choose.randint(1, 4))
                continue
            answer = await self.service.stream(self.http, query, name, max_tokens=TOKENS)
            allowed = [self.answers[name, version, query] for version in self.live_between(name, began)]
            self.record.lost += answer.lost
            if answer.error and not answer.lost:
                self.record.told[answer.error.split(" ")[0].rstrip(":")] += 1
                await asyncio.sleep(choose.uniform(0.2, 1.0))
            elif answer.text in allowed:
                self.record.right += 1
            if not any(text.startswith(answer.text) if answer.error else text == answer.text for text in allowed):
                said = [key for key, text in self.answers.items() if text == answer.text]
                self.record.wrong.append(f"{name} {query!r}: {answer.text!r}, which is what {said} would say")
                print(self.record.wrong[-1], flush=True)

    async def give_up(self, query: str, name: str, events: int) -> None:
        """Read some events of a stream, then close the connection."""
        body = self.service.body(name, query, stream=True, max_tokens=TOKENS)
        try:
            async with self.http.stream("POST", f"{self.service.url}/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    events -= line.startswith("data: ")
                    if events <= 0:
                        self.record.cancelled += response.status_code == 200
                        return
        except httpx.TransportError:
            self.record.told["connection"] += 1

    def live_between(self, name: str, began: float) -> set[str]:
        """Versions of an adapter that answered at some time since `began`."""
        since = self.live[name]
        ends = [at for at, _ in since[1:]] + [float("inf")]
        return {version for (_, version), end in zip(since, ends, strict=True) if end >= began}

    async def release(self) -> None:
        choose = random.Random("release")
        while not self.over:
            await asyncio.sleep(RELEASE_S)
            name = f"adapter-{choose.randrange(ADAPTERS)}"
            version = next(v for v in VERSIONS if v != self.live[name][-1][1])
            self.live[name].append((float("inf"), version))  # while it is being written, either may answer
            await asyncio.to_thread(release_version, AdapterStore(self.store), name, version)
            self.live[name][-1] = (time.monotonic(), version)
            self.record.released += 1

    async def kill(self) -> None:
        elder = self.elder()
        every = min(KILL_S, self.seconds / 5)
        while not self.over:
            await asyncio.sleep(every)
            for younger in {*self.service.replicas()} - {elder}:
                os.kill(younger, signal.SIGKILL)
                self.record.killed += 1
                print(
                    f"{time.monotonic() - self.began:5.0f} s: killed replica {younger}; {self.record.right} right, "
                    f"{self.record.cancelled} given up, {self.record.memory[-1][1] / 2**20:.0f} MiB", flush=True,
                )

    def elder(self) -> int:
        started = self.service.folder / "replicas"
        return min(self.service.replicas(), key=lambda pid: (started / str(pid)).stat().st_mtime)

    async def measure_memory(self) -> None:
        elder = self.elder()
        while not self.over:
            status = Path(f"/proc/{elder}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            assert found, status
            self.record.memory.append((time.monotonic() - self.began, int(found[1]) * 1024))
            await asyncio.sleep(SAMPLE_S)


def values_of(metrics: str, name: str, pids: set[int]) -> list[float]:
    """The values of a metric in Prometheus' text; of those that name a process, the ones of living processes."""
    lines = re.findall(rf"^ray_{name}\{{(.*)\}} (\S+)$", metrics, re.MULTILINE)
    named = [(re.search(r'[Pp]id="(\d+)"', labels), float(value)) for labels, value in lines]
    return [value for pid, value in named if not pid or int(pid[1]) in pids]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    args = parser.parse_args()
    header(f"{args.minutes} min, {args.clients} clients, 2 replicas, {ADAPTERS} adapters of which {LOADED} fit")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny(folder / "model", "Llama")
        for adapter in range(ADAPTERS):
            for number, version in enumerate(VERSIONS):
                put_in_store(folder / "store", f"adapter-{adapter}", base, 2 * adapter + number, version)
        limits = ServeConfig(
            port=free_port(), engine="watched", min_replicas=2, max_replicas=2, max_ongoing_requests=8,
            max_queued_requests=16, max_loras=LOADED,
        )
        config = RunConfig(
            name="soak", store=str(folder / "store"), model=ModelConfig(base=str(base)),
            prompt=PromptConfig(chat="chatml", query="Q: {query}"), serve=limits,
        )

        async def soak(service: Service) -> Record:
            async with httpx.AsyncClient(timeout=120) as http:
                made = Soak(service, folder / "store", http, args.minutes * 60)
                await made.learn_answers()
                await made.run(args.clients)
                return made.record

        with Service(folder, config) as service:
            record = asyncio.run(soak(service))
    failures = record.failures(args.minutes * 60)
    for line in failures:
        print(f"  {line}")
    last_line(
        minutes=args.minutes, right=record.right, wrong=len(record.wrong), lost=record.lost,
        cancelled=record.cancelled, released=record.released, killed=record.killed, left_open=record.left_open,
        told=sum(record.told.values()), memory_growth=record.growth(args.minutes * 60),
        memory_mib=record.memory[-1][1] / 2**20,
    )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
