"""Preparation as a whole on Ray Data: rows a second with 1 and 2 workers, the driver's peak memory, and a run whose work is all cached.

    python -m tests.bench.prepare [--rows 50000] [--tokens 200] [--shots 0] [--timed 20000] [--folder FOLDER] [--parts scaling whole]

Rows are made up: sentences of a small language, about `--tokens` tokens of query and answer each, all different. Three phases as by default, the
template not compressed, so that it is rows that take the time. Each run is a process of its own, and so is its driver's peak (VmHWM): the Ray
workers, which tokenise, are other processes.

    scaling   `--timed` rows with Ray held to 1 and to 2 CPUs; seconds from the first row that is read to the last shard, Ray's start not counted
    whole     `--rows` rows, the driver's peak memory, and the same command again, which must find that all is there
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.report import header, last_line

PARTS = ("scaling", "whole")
WORDS = 4000  # of the language; most are a token or two
TEMPLATE = "# Instruction\n\nAnswer each request with one command, and nothing else.\n"
DEV, TEST = 100, 100


def write_rows(folder: Path, rows: int, tokens: int) -> None:
    """train.jsonl, dev.jsonl, test.jsonl and template.md."""
    (folder / "template.md").write_text(TEMPLATE)
    for split, count in (("train", rows), ("dev", DEV), ("test", TEST)):
        with open(folder / f"{split}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(split, count, tokens))


def _rows(split: str, count: int, tokens: int) -> Iterator[dict[str, str]]:
    language, rng = random.Random(0), random.Random(split)
    words = ["".join(language.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 2) for _ in range(WORDS)]
    asked, answered = max(1, tokens * 7 // 20), max(1, tokens * 3 // 20)  # a word is about two tokens
    for i in range(count):
        yield {"id": f"{split}-{i}", "query": f"{split} {i}: {' '.join(rng.choices(words, k=asked))}", "answer": " ".join(rng.choices(words, k=answered))}


def config_of(folder: Path, run: str, shots: int) -> dict[str, Any]:
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")}
    return {
        "name": "bench", "run_dir": str(folder / run), "task": {**files, "template": str(folder / "template.md")}, "prompt": {"chat": "chatml"},
        "compress": {"name": "none"}, "schedule": {"shots": shots},
    }


def worker(settings: Path, cpus: int) -> None:
    """In a process of its own: start Ray with so many CPUs, prepare, print figures as one line of JSON."""
    import logging

    import ray

    from pi_ray.config import RunConfig
    from pi_ray.data.prepare import prepare

    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    said: list[str] = []
    begin = time.perf_counter()
    prepare(RunConfig.model_validate_json(settings.read_text()), said.append)
    seconds = time.perf_counter() - begin
    ray.shutdown()
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "rss_gib": peak / 2**20, "said": said}))


def run(folder: Path, name: str, shots: int, cpus: int) -> dict[str, Any]:
    settings = folder / f"{name}.json"
    settings.write_text(json.dumps(config_of(folder, name, shots)))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "tests.bench.prepare", "--worker", str(settings), "--cpus", str(cpus)], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"preparation of '{name}' failed with exit status {done.returncode}")
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": time.perf_counter() - begin}


def scaling(folder: Path, args: argparse.Namespace) -> float:
    """How many times as fast 2 workers are as 1. Rows are written anew, so that nothing is cached but the tokenizer."""
    write_rows(folder, args.timed, args.tokens)
    found = {cpus: run(folder, f"scaling-{cpus}", args.shots, cpus)["seconds"] for cpus in (1, 2)}
    for cpus, seconds in found.items():
        print(f"  {args.timed:,} rows of {args.tokens} tokens, 3 phases, {args.shots} shots, {cpus} worker(s): {seconds:.1f} s, {args.timed / seconds:,.0f} rows/s", flush=True)
    return found[1] / found[2]


def whole(folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """(the driver's peak memory in GiB, seconds of the same run again)."""
    write_rows(folder, args.rows, args.tokens)
    size = (folder / "train.jsonl").stat().st_size
    first = run(folder, "whole", args.shots, os.cpu_count() or 1)
    again = run(folder, "whole", args.shots, os.cpu_count() or 1)
    if not again["said"][0].startswith("prepare: nothing to do"):
        raise SystemExit(f"the second run was not cached: {again['said']}")
    print(f"  {args.rows:,} rows ({size / 2**30:.2f} GiB of JSON): {first['seconds']:.0f} s, {args.rows / first['seconds']:,.0f} rows/s, driver's peak {first['rss_gib']:.2f} GiB")
    print(f"  the same again, all cached: {again['seconds']:.2f} s; with Python and Ray started {again['process_s']:.1f} s", flush=True)
    return first["rss_gib"], again["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="of `whole`; the goal of 2 GiB is for 1000000")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--shots", type=int, default=0, help="examples in the first phase; above 0 neighbours are searched too")
    parser.add_argument("--timed", type=int, default=20_000, help="rows of `scaling`")
    parser.add_argument("--folder", type=Path, help="where rows and runs are written; default: a temporary folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cpus", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.cpus)
        return
    header("preparation on Ray Data")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if "scaling" in args.parts:
            (Path(folder) / "scaling").mkdir()
            figures["workers2_over_1"] = scaling(Path(folder) / "scaling", args)
        if "whole" in args.parts:
            (Path(folder) / "whole").mkdir()
            figures["driver_rss_gib"], figures["cached_s"] = whole(Path(folder) / "whole", args)
    last_line(**figures)


if __name__ == "__main__":
    main()
