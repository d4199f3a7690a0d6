"""Compressors: the rate that was asked for against the rate that came out, and rows a second.

    python -m tests.bench.compress --data FOLDER [--every 16] [--most 0] [--rows 32] [--llmlingua2 MODEL]

FOLDER has the tldr pages (tldr/pages/*.md) and the Calc help pages (calc*.jsonl with a "text" in each line) somewhere
below it; the bundled tasks' templates come with them. The compressors that score with the packaged model run on every
n-th page; LLMLingua-2 where MODEL is given.

`max_rate_error` is the largest distance of all results but those whose protected text alone is above the rate, which
are counted apart. The peer of `over_loop` is the package's compressor called in a loop, on all cores, over the same
pages at the same rate. It has our mending of keys and values, because without it the package does not run on current
transformers. `actors2_over_1` compares actors of half the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pi_ray import models, tasks
from pi_ray.compress.llmlingua import LLMLingua
from pi_ray.compress.rate_control import CompressedTemplate, RateSearch
from pi_ray.compress.template import load_compressor
from pi_ray.config import CompressConfig, ModelConfig
from pi_ray.data.ray_map import fan_out
from pi_ray.prompt import Template
from tests.bench.report import header, last_line

RATES = (0.3, 0.5, 0.8)
RATE = 0.5  # of the timed part
OFFLINE = ("llmlingua", "longllmlingua", "selective")
WARM_UP = "One row to warm up with, so that nothing is loaded while others are timed."
MEET_S = 180.0  # how long an actor waits for the others before it starts


def texts(folder: Path) -> dict[str, list[Template]]:
    """The texts of each kind, a page as an instruction without documents. Exits when the folder lacks one."""
    pages = [page.read_text(encoding="utf-8") for page in sorted(folder.rglob("tldr/pages/*.md"))]
    lines = [
        line
        for file in sorted(folder.rglob("calc*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    if not pages or not lines:
        raise SystemExit(f"{folder}: no {'tldr/pages/*.md' if not pages else 'calc*.jsonl'} below it")
    templates = [Template.load(file) for file in sorted(Path(tasks.__file__).parent.glob("*.md"))]
    return {
        "tldr": [Template(page) for page in pages], "calc": [Template(json.loads(line)["text"]) for line in lines],
        "templates": templates,
    }


def is_protected(made: CompressedTemplate) -> bool:
    """Whether the rate could not be met by anything that keeps what is protected."""
    return "protected text alone" in made.note


def worst(made: Iterable[CompressedTemplate]) -> float:
    """The largest distance from the asked rate, of those that could be met."""
    return max((abs(m.achieved - m.asked) for m in made if not is_protected(m)), default=0.0)


def rows_a_second(spans: Sequence[tuple[float, float]]) -> float:
    """Of (begin, end) seconds of each row, whoever did it."""
    return len(spans) / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def rates(config: CompressConfig, groups: dict[str, list[Template]], tokenizer: Any) -> list[CompressedTemplate]:
    """Every text at every rate, with a line for each group."""
    compressor = load_compressor(config)
    every: list[CompressedTemplate] = []
    for group, some in groups.items():
        started = time.perf_counter()
        made = [RateSearch(compressor, text, rate, tokenizer, config).run() for text in some for rate in RATES]
        sizes, held = [m.full_tokens for m in made], sum(map(is_protected, made))
        free = [abs(m.achieved - m.asked) for m in made if not is_protected(m)] or [0.0]
        print(
            f"  {config.name:14} {group:10} {len(some):4} texts of {min(sizes)} to {max(sizes)} tokens: error mean "
            f"{sum(free) / len(free):.3f}, max {max(free):.3f}, {held} of {len(made)} results above the rate by "
            f"protected text; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        every += made
    return every


class CompressRow:
    """Work of an actor: when all actors have their model, rows at once; each row gives (begin, end)."""

    def __init__(self, actors: int, folder: str, threads: int):
        torch.set_num_threads(threads)
        self.compressor = LLMLingua(CompressConfig())
        self.compressor.compress(WARM_UP, RATE)
        (Path(folder) / str(os.getpid())).touch()
        until = time.time() + MEET_S
        while len(os.listdir(folder)) < actors and time.time() < until:
            time.sleep(0.05)

    def __call__(self, item: dict[str, Any]) -> tuple[float, float]:
        begin = time.time()
        self.compressor.compress(item["text"], RATE)
        return begin, time.time()


def in_actors(rows: Sequence[str], actors: int) -> float:
    threads = max(1, (os.cpu_count() or 1) // 2)
    with tempfile.TemporaryDirectory() as folder:
        return rows_a_second(
            fan_out(
                [{"text": text} for text in rows], CompressRow, actors, folder, threads, actors=actors, num_cpus=threads
            )
        )


def in_a_loop(rows: Sequence[str]) -> float:
    compressor = LLMLingua(CompressConfig())
    compressor.compress(WARM_UP, RATE)
    lengths = [len(compressor.tokenizer(text, add_special_tokens=False).input_ids) for text in rows]
    begin = time.time()
    for text, length in zip(rows, lengths, strict=True):
        compressor.kept_tokens(text, length, RATE)
    return rows_a_second([(begin, time.time())] * len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=16, help="take every n-th page; templates are all taken")
    parser.add_argument("--most", type=int, default=0, help="of each kind at most so many texts, templates too; 0: all")
    parser.add_argument("--rows", type=int, default=32, help="pages of the timed part")
    parser.add_argument("--llmlingua2", default="", help="folder or hub id of a token classifier")
    args = parser.parse_args()
    header("compressors: achieved rate, and rows a second in Ray Data actors")
    groups, tokenizer = texts(args.data), models.load_tokenizer(ModelConfig())
    some = {
        name: (found if name == "templates" else found[:: args.every])[: args.most or None]
        for name, found in groups.items()
    }
    configs = [CompressConfig(name=name) for name in OFFLINE] + (
        [CompressConfig(name="llmlingua2", model=args.llmlingua2)] if args.llmlingua2 else []
    )
    made = [result for config in configs for result in rates(config, some, tokenizer)]
    pages = [page.text for page in groups["tldr"][: args.rows]]
    loop = in_a_loop(pages)
    one, two = in_actors(pages, 1), in_actors(pages, 2)
    print(
        f"  llmlingua on {len(pages)} tldr pages: loop {loop:.2f} rows/s, 1 actor {one:.2f}, 2 actors {two:.2f}",
        flush=True,
    )
    last_line(max_rate_error=worst(made), actors2_over_1=two / one, over_loop=two / loop)


if __name__ == "__main__":
    main()
