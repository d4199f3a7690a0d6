"""Streaming clients against a server whose replicas are killed.

    python -m tests.bench.chaos [--minutes 5] [--clients 24]

Each client asks one of several adapters one of several queries, over and over, and compares the streamed answer with
the one that the quiet server gave before. Every minute a replica gets SIGKILL. A client that is told of a failure (429,
408, 5xx, an error in the stream, a broken connection) asks again, as OpenAI's clients do. What may not happen: another
answer than the right one, or a stream that ends as if it were whole and is not.

The engine is the real one, on a tiny random model, or with --model on that one. Last line JSON; exit status 1 when
something happened that may not, or no replica was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, ServeConfig
from pi_ray.models.base_files import resolve_base
from tests.bench.report import header
from tests.conftest import tiny
from tests.faults.service import Answer, Service, free_port
from tests.lora import put_in_store

ADAPTERS, QUERIES, TOKENS = 4, 8, 48
SLOTS, QUEUE = 8, 16
EVERY_S = 60


class Tally:
    """What happened to all requests."""

    def __init__(self) -> None:
        self.right = self.wrong = self.lost = self.killed = 0
        self.errors: Counter[str] = Counter()
        self.recovered: list[float] = []

    def note(self, answer: Answer, asked: tuple[str, str], answers: dict[tuple[str, str], str]) -> None:
        expected = answers[asked]
        # also what came before an error must be right
        right = expected.startswith(answer.text) if answer.error else answer.text == expected
        if answer.lost:
            self.lost += 1
        elif answer.error:
            self.errors[answer.error.split(" ")[0] if answer.error[0].isdigit() else answer.error.split(":")[0]] += 1
        else:
            self.right += right
        if not right:
            self.wrong += 1
            owners = [other for other, text in answers.items() if text == answer.text]
            print(
                f"wrong: {asked} was answered with {answer.text!r} instead of {expected!r}"
                + (f", which is the answer to {owners}" if owners else ""),
                flush=True,
            )

    def failed(self) -> bool:
        """Also where nothing was put to the test."""
        return bool(
            self.wrong or self.lost or not self.right or not self.killed or set(self.errors) & {"400", "404", "422"}
        )


async def client(
    service: Service, http: httpx.AsyncClient, expected: dict[tuple[str, str], str], tally: Tally, until: float,
    seed: int,
) -> None:
    choose = random.Random(seed)
    while time.monotonic() < until:
        model, query = choose.choice(sorted(expected))
        while True:
            answer = await service.stream(http, query, model, max_tokens=TOKENS)
            tally.note(answer, (model, query), expected)
            if not answer.error or answer.lost:
                break
            if time.monotonic() > until + 60:
                tally.lost += 1  # it could be tried again, and never worked
                break
            await asyncio.sleep(choose.uniform(0.2, 1.0))


async def kill(service: Service, tally: Tally, every: float, until: float) -> None:
    """Kill one living replica at random each `every` seconds; note how long until there are as many as before."""
    while time.monotonic() + every < until:
        await asyncio.sleep(every)
        living = service.replicas()
        if not living:
            continue
        victim = random.choice(living)
        os.kill(victim, signal.SIGKILL)
        tally.killed += 1
        print(
            f"killed replica {victim}; so far {tally.right} right, {tally.wrong} wrong, {tally.lost} lost, told: "
            f"{dict(tally.errors)}",
            flush=True,
        )
        began = time.monotonic()
        while len(service.replicas()) < len(living) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        tally.recovered.append(time.monotonic() - began)


async def storm(service: Service, clients: int, seconds: float, every: float) -> Tally:
    tally = Tally()
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=clients)) as http:
        expected = {}
        for a in range(ADAPTERS):
            for q in range(QUERIES):
                query, model = f"question {q} about the number {q * 37}", f"adapter-{a}"
                answer = await service.stream(http, query, model, max_tokens=TOKENS)
                assert not answer.error, answer
                expected[model, query] = answer.text
        assert len(set(expected.values())) > ADAPTERS * QUERIES // 2, "the answers do not tell requests apart"
        until = time.monotonic() + seconds
        await asyncio.gather(
            *(client(service, http, expected, tally, until, i) for i in range(clients)),
            kill(service, tally, every, until),
        )
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between kills")
    parser.add_argument("--model", help="a base model's folder or packaged name; default: a tiny random one")
    args = parser.parse_args()
    header(f"{args.clients} streaming clients, {args.replicas} replicas, one killed every {args.every:.0f} s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = resolve_base(args.model) if args.model else str(tiny(folder / "model", "Llama"))
        for a in range(ADAPTERS):
            put_in_store(folder / "store", f"adapter-{a}", base, a)
        limits = ServeConfig(
            port=free_port(), engine="watched", min_replicas=args.replicas, max_replicas=args.replicas,
            max_ongoing_requests=SLOTS, max_queued_requests=QUEUE,
        )
        config = RunConfig(
            name="chaos", store=str(folder / "store"), model=ModelConfig(base=base),
            prompt=PromptConfig(chat="chatml", query="Q: {query}"), serve=limits,
        )
        with Service(folder, config) as service:
            tally = asyncio.run(storm(service, args.clients, args.minutes * 60, args.every))
    figures = {
        "minutes": args.minutes, "clients": args.clients, "replicas": args.replicas, "killed": tally.killed,
        "right": tally.right, "wrong": tally.wrong, "lost": tally.lost,
        "told": sum(tally.errors.values()), "told_by": dict(sorted(tally.errors.items())),
        "recovery_s": round(statistics.median(tally.recovered), 1) if tally.recovered else None,
    }  # fmt: skip
    print(json.dumps(figures))
    return int(tally.failed())


if __name__ == "__main__":
    sys.exit(main())
