"""Prompts sent whole to two replicas, by Ray Serve's usual router and by Ray's prefix-aware one; and the query alone.

    python -m tests.bench.router [--requests 60] [--prompts 8] [--rounds 3] [--tokens 4] [--folder FOLDER]

Several applications share a base model, each with a prompt of its own, and a replica's prefix cache holds five of eight
prompts. `serve.router: prefix` sends a request to the replica that has read its prompt, which is the un-internalised
opponent at its best; the other opponent is `power_of_two`, Serve's default. The third side asks an adapter the same
queries without a prompt. All sides answer the same queries in the same order with the same number of tokens, each round
by new servers. Last line: one JSON object, with medians over rounds and ratios of requests a second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.tasks.opsql.task import OpsqlTask
from tests.bench import serve
from tests.bench.report import header, last_line

CACHED_PROMPTS = 5  # that a replica's prefix cache holds
BYTES_OF_A_TOKEN = 30 * 2 * 3 * 64 * 4  # of SmolLM2-135M's keys and values: layers, both, heads, width, float32
SIDES = {"power_of_two": "base", "prefix": "base", "query alone": "a0"}
CLIENTS = 4


def messages(requests: int, prompts: int, full: bool) -> list[str]:
    """The queries in order; with `full` each behind the prompt of the application that asks it."""
    template = OpsqlTask(TaskConfig(name="opsql")).template().text
    choose = random.Random(0)
    found = []
    for query in serve.queries(requests + serve.WARM):
        head = f"Handbook of team {choose.randrange(prompts)}.\n\n{template}\n\n" if full else ""
        found.append(head + serve.QUERY.replace("{query}", query) if full else query)
    return found


def run_side(folder: Path, side: str, args: argparse.Namespace) -> serve.Level:
    full = SIDES[side] == "base"
    asks = [(SIDES[side], message) for message in messages(args.requests, args.prompts, full)]
    cache = CACHED_PROMPTS * 500 * BYTES_OF_A_TOKEN >> 20
    router = "power_of_two" if side == "query alone" else side
    settings: dict[str, Any] = {"router": router, "min_replicas": 2, "max_replicas": 2}
    part = serve.Part(side.replace(" ", "-"), (SIDES[side],), full, (("prefix_cache_mb", cache),))
    with serve.pi_ray(folder, part, CLIENTS, **settings) as url:
        asyncio.run(serve.drive(url, asks[-serve.WARM :], args.tokens, CLIENTS))
        seconds, replies = asyncio.run(serve.drive(url, asks[: -serve.WARM], args.tokens, CLIENTS))
    level = serve.Level(side, CLIENTS, seconds, tuple(replies))
    print(level.row(), flush=True)
    return level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", help="where models and logs are kept for the next time")
    args = parser.parse_args()
    header(f"2 replicas, {args.prompts} prompts of which a replica's cache holds {CACHED_PROMPTS}, {CLIENTS} clients")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.folder or name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "complete").exists():
            serve.make_models(folder, args.model)
        rounds = [{side: run_side(folder, side, args) for side in SIDES} for _ in range(args.rounds)]
    rates = {side: [levels[side].rate for levels in rounds] for side in SIDES}
    firsts = {side: [median(r.first for r in levels[side].replies) for levels in rounds] for side in SIDES}

    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    for side in SIDES:
        spread = f"{min(rates[side]):.2f} to {max(rates[side]):.2f}"
        print(f"  {side:14} {median(rates[side]):6.2f} requests/s ({spread}), first text {median(firsts[side]):.3f} s")
    last_line(
        rounds=args.rounds, prefix_over_power_of_two=ratio("prefix", "power_of_two"),
        query_alone_over_prefix=ratio("query alone", "prefix"),
        query_alone_over_power_of_two=ratio("query alone", "power_of_two"),
        **{f"first_text_s_{side.replace(' ', '_')}": median(values) for side, values in firsts.items()},
    )


if __name__ == "__main__":
    main()
