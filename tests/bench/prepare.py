"""Preparation on Ray Data: rows a second with 1 and 2 workers, the driver's peak memory, and a run that is cached.

    python -m tests.bench.prepare [--parts scaling documents whole] [--rows 50000] [--timed 20000] [--documents 50000]
                                  [--tokens 200] [--shots 0] [--folder FOLDER]

Rows are made up: sentences of a small language, about `--tokens` tokens of query and answer each, all different. Three
phases as by default; the template is not compressed, so that rows take the time. Each run is a process of its own, and
so is its driver's peak (VmHWM): the Ray workers are other processes.

    scaling    `--timed` rows with Ray held to 1 and to 2 CPUs; seconds from the first row that is read to the last
               file, Ray's start not counted
    documents  the same for `--documents` rows that bring a document each, compressed at the middle phase's rate by the
               cheapest compressor (none), which leaves reading, counting tokens, tokenising and writing to be timed
    whole      `--rows` rows, the driver's peak memory, and the same command again, which must find that all is there
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.report import header, last_line

PARTS = ("scaling", "documents", "whole")
WORDS = 4000  # of the language; most are a token or two
TEMPLATE = "# Instruction\n\nAnswer each request with one command, and nothing else.\n"
DEV, TEST = 100, 100


def write_rows(folder: Path, rows: int, tokens: int, documents: int = 0) -> None:
    """Write train.jsonl, dev.jsonl, test.jsonl and template.md; each row brings so many documents of 30 words."""
    (folder / "template.md").write_text(TEMPLATE)
    for split, count in (("train", rows), ("dev", DEV), ("test", TEST)):
        with open(folder / f"{split}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(split, count, tokens, documents))


def _rows(split: str, count: int, tokens: int, documents: int) -> Iterator[dict[str, Any]]:
    language, rng = random.Random(0), random.Random(split)
    words = ["".join(language.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 2) for _ in range(WORDS)]
    asked, answered = max(1, tokens * 7 // 20), max(1, tokens * 3 // 20)  # a word is about two tokens
    for i in range(count):
        query, answer = (" ".join(rng.choices(words, k=k)) for k in (asked, answered))
        own = {"documents": [" ".join(rng.choices(words, k=30)) for _ in range(documents)]} if documents else {}
        yield {"id": f"{split}-{i}", "query": f"{split} {i}: {query}", "answer": answer, **own}


def config_of(folder: Path, run: str, shots: int) -> dict[str, Any]:
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")}
    return {
        "name": "bench", "run_dir": str(folder / run), "task": {**files, "template": str(folder / "template.md")},
        "prompt": {"chat": "chatml"}, "compress": {"name": "none"}, "schedule": {"shots": shots},
    }


def worker(settings: Path, cpus: int) -> None:
    """In a process of its own: start Ray with so many CPUs, prepare, print figures as one line of JSON."""
    import logging

    import ray

    from pi_ray.config import RunConfig
    from pi_ray.data.prepare import prepare

    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    config = RunConfig.model_validate_json(settings.read_text())
    said: list[str] = []
    begin = time.perf_counter()
    prepare(config, said.append)
    seconds = time.perf_counter() - begin
    ray.shutdown()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "rss_gib": peak / 2**20, "said": said}))


def run(folder: Path, name: str, shots: int, cpus: int) -> dict[str, Any]:
    settings = folder / f"{name}.json"
    settings.write_text(json.dumps(config_of(folder, name, shots)))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "PI_RAY_CACHE": str(folder / "cache")}
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | quiet
    if not (folder / "cache").exists():  # the model is converted outside of what is measured
        warm_up = "from pi_ray import config, models; models.load_tokenizer(config.ModelConfig())"
        subprocess.run([sys.executable, "-c", warm_up], env=environment, stderr=subprocess.DEVNULL, check=True)
    words = [sys.executable, "-m", "tests.bench.prepare", "--worker", str(settings), "--cpus", str(cpus)]
    begin = time.perf_counter()
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"preparation of '{name}' failed with exit status {done.returncode}")
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": time.perf_counter() - begin}


def scaling(folder: Path, args: argparse.Namespace, rows: int, documents: int = 0) -> float:
    """How many times as fast 2 workers are as 1. Rows are written anew, so that nothing is cached but the tokenizer."""
    write_rows(folder, rows, args.tokens, documents)
    found = {}
    for cpus in (1, 2):
        found[cpus] = run(folder, f"run-{cpus}", args.shots, cpus)["seconds"]
        shutil.rmtree(folder / "cache" / "compress", ignore_errors=True)  # or the second run would find documents there
    kind = f"{args.tokens} tokens" + (f" and {documents} document" if documents else "")
    for cpus, seconds in found.items():
        speed = f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s"
        print(f"  {rows:,} rows of {kind}, 3 phases, {args.shots} shots, {cpus} worker(s): {speed}", flush=True)
    return found[1] / found[2]


def whole(folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """(the driver's peak memory in GiB, seconds of the same run again)."""
    write_rows(folder, args.rows, args.tokens)
    size = (folder / "train.jsonl").stat().st_size
    first = run(folder, "whole", args.shots, os.cpu_count() or 1)
    again = run(folder, "whole", args.shots, os.cpu_count() or 1)
    if not again["said"][0].startswith("prepare: nothing to do"):
        raise SystemExit(f"the second run was not cached: {again['said']}")
    speed = f"{first['seconds']:.0f} s, {args.rows / first['seconds']:,.0f} rows/s"
    print(f"  {args.rows:,} rows ({size / 2**30:.2f} GiB of JSON): {speed}, driver's peak {first['rss_gib']:.2f} GiB")
    cached = f"{again['seconds']:.2f} s; with Python and Ray started {again['process_s']:.1f} s"
    print(f"  the same again, all cached: {cached}", flush=True)
    return first["rss_gib"], again["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="of `whole`; the goal of 1.5 GiB is for 1000000")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--shots", type=int, default=0, help="of the first phase; above 0 neighbours are searched too")
    parser.add_argument("--timed", type=int, default=20_000, help="rows of `scaling`")
    parser.add_argument("--documents", type=int, default=50_000, help="rows of `documents`")
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
            figures["workers2_over_1"] = scaling(Path(folder) / "scaling", args, args.timed)
        if "documents" in args.parts:
            (Path(folder) / "documents").mkdir()
            figures["documents_workers2_over_1"] = scaling(Path(folder) / "documents", args, args.documents, 1)
        if "whole" in args.parts:
            (Path(folder) / "whole").mkdir()
            figures["driver_rss_gib"], figures["cached_s"] = whole(Path(folder) / "whole", args)
    last_line(**figures)


if __name__ == "__main__":
    main()
