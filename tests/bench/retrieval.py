"""Retrieval: exact BLEU against sacrebleu pair by pair, whole banks, FAISS with rerank against exact, and growth with
the size of the bank.

python -m tests.bench.retrieval --data FOLDER [--parts sacrebleu nl2bash bank53k growth] [--rows 53000] [--sizes 5000
... 200000] [--threads 2]

FOLDER has nl2bash/train.cm and wikisql/text2sql-data.wikisql.json.bz2 somewhere below it. Of WikiSQL each question's
SQL is an answer, with its values filled in; banks larger than its 80,654 questions go on with the same queries about
other values. Each row looks for its 10 best among all others, exact and by FAISS, in the same process and with the same
threads; compiling is done before anything is timed. Both need the bank's n-grams: `exact` and `FAISS + rerank` are the
seconds of everything after that, building FAISS's index included, and the n-grams' own are printed.

`exact_over_sacrebleu` compares pairs a second of one sample: sacrebleu calls `sentence_score` for each pair in one
process, as it is made for.
"""

from __future__ import annotations

import argparse
import bz2
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from pi_ray.config import RetrieveConfig
from pi_ray.retrieve.bleu import BleuIndex
from pi_ray.retrieve.candidates import Candidates
from tests.bench.report import header, last_line

K = 10
CANDIDATES = RetrieveConfig().candidates
PARTS = ("sacrebleu", "nl2bash", "bank53k", "growth")
SIZES = (5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
PAIRS = 20_000  # that sacrebleu scores
SAMPLE = 2_000  # rows of one size in `growth`; the rest is scaled up
AGREE = 1e-4
BLOCK = 512


@dataclass(frozen=True)
class Timed:
    """Seconds, and the scores of what was chosen, best first, shape (rows, K)."""

    seconds: float
    scores: np.ndarray


def nl2bash(folder: Path) -> list[str]:
    return _find(folder, "nl2bash/train.cm").read_text(encoding="utf-8").splitlines()


def wikisql(folder: Path, count: int) -> list[str]:
    """SQL with the values of its question; more than there are questions by turns of other values."""
    entries = json.loads(bz2.decompress(_find(folder, "wikisql/text2sql-data.wikisql.json.bz2").read_bytes()))
    found = list(islice(_answers(entries), count))
    rng = random.Random(0)
    while len(found) < count:
        found.append(re.sub(r'"[^"]*"', lambda m: f'"{rng.randrange(10**6)} {m[0][1:]}', found[rng.randrange(80_000)]))
    return found


def _answers(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        sql = re.sub(r"TABLEalias0\.| AS TABLEalias0|_FIELD", "", entry["sql"][0])
        for sentence in entry["sentences"]:
            yield re.sub(r"var\d+", lambda m, values=sentence["variables"]: values.get(m[0], m[0]), sql)


def _find(folder: Path, name: str) -> Path:
    found = next(iter(sorted(folder.rglob(name))), None)
    if found is None:
        raise SystemExit(f"{folder}: no {name} below it")
    return found


def index(bank: Sequence[str]) -> tuple[BleuIndex, float]:
    """Each text is a group of its own, so that no row finds itself. With the seconds that it takes."""
    begin = time.perf_counter()
    return BleuIndex(bank, np.arange(len(bank))), time.perf_counter() - begin


def exact(
    bank: BleuIndex, texts: Sequence[str], rows: np.ndarray, threads: int, candidates: Candidates | None = None,
) -> Timed:
    """The best of these rows of the bank, among the proposals of `candidates` where they are given."""
    begin = time.perf_counter()

    def best(at: int) -> np.ndarray:
        some = rows[at : at + BLOCK]
        asked = [texts[i] for i in some]
        return bank.top(asked, K, some, candidates.nearest(asked, CANDIDATES) if candidates else None)[1]

    # blocks side by side, as actors take them
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        scores = np.concatenate(list(pool.map(best, range(0, len(rows), BLOCK))))
    return Timed(time.perf_counter() - begin, scores)


def by_faiss(bank: BleuIndex, texts: Sequence[str], rows: np.ndarray, threads: int) -> tuple[Timed, float]:
    """As `exact`, with FAISS's proposals; and the seconds that building its index took of it."""
    begin = time.perf_counter()
    candidates = Candidates(bank, texts)
    built = time.perf_counter() - begin
    found = exact(bank, texts, rows, threads, candidates)
    return Timed(built + found.seconds, found.scores), built


def against_sacrebleu(texts: Sequence[str], threads: int) -> float:
    """Pairs a second of the exact index over sacrebleu's, on one sample; exits where a score differs."""
    from sacrebleu.metrics.bleu import BLEU

    peer, rng = BLEU(effective_order=True), np.random.default_rng(0)
    rows = rng.choice(len(texts), min(PAIRS // 100, len(texts)), replace=False)
    bank = rng.choice(len(texts), 100, replace=False)
    begin = time.perf_counter()
    expected = np.array([[peer.sentence_score(texts[j], [texts[i]]).score for j in bank] for i in rows])
    theirs = expected.size / (time.perf_counter() - begin)
    whole, _ = index(texts)
    found = whole.scores([texts[i] for i in rows], np.broadcast_to(bank, expected.shape))
    if (worst := np.abs(found - expected).max()) > AGREE:
        raise SystemExit(f"a score differs from sacrebleu's by {worst:g}")
    timed = exact(whole, texts, np.arange(len(texts)), threads)
    ours = len(texts) ** 2 / timed.seconds
    print(
        f"  sacrebleu {theirs:,.0f} pairs/s; exact {ours / 1e6:,.0f} million pairs/s, {ours / theirs:,.0f} times as "
        f"many; largest difference of {expected.size:,} scores {worst:.1e}",
        flush=True,
    )
    return ours / theirs


def whole(texts: Sequence[str], threads: int) -> float:
    """Seconds of the exact 10 best of all rows, n-grams included."""
    bank, counted = index(texts)
    seconds = exact(bank, texts, np.arange(len(texts)), threads).seconds
    print(f"  {len(texts):,} answers: n-grams {counted:.2f} s, exact {K} best of every row {seconds:.2f} s", flush=True)
    return counted + seconds


def compared(texts: Sequence[str], threads: int, rows: np.ndarray) -> dict[str, float]:
    """Exact against FAISS over one bank, for these of its rows; both scaled to all rows, FAISS's index built once."""
    bank, counted = index(texts)
    best, (near, built) = exact(bank, texts, rows, threads), by_faiss(bank, texts, rows, threads)
    scale = len(texts) / len(rows)
    took = {"ngrams_s": counted, "exact_s": best.seconds * scale, "faiss_s": built + (near.seconds - built) * scale}
    share = near.scores.mean() / best.scores.mean()
    recall = np.mean(near.scores >= best.scores[:, -1:] - 1e-6)
    print(
        f"  {len(texts):7,} answers: n-grams {counted:6.1f} s; exact {took['exact_s']:7.1f} s; FAISS + rerank "
        f"{took['faiss_s']:6.1f} s (its index {built:.1f} s), "
        f"{took['exact_s'] / took['faiss_s']:.1f} times as fast, recall@{K} {recall:.1%}, mean BLEU "
        f"{near.scores.mean():.2f} of {best.scores.mean():.2f} ({share:.2%})",
        flush=True,
    )
    return {**took, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, default=53_000, help="of the WikiSQL bank")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of the banks of `growth`")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    header("retrieval: exact BLEU, and FAISS with rerank")
    by_faiss(index(["a b c", "a b"])[0], ["a b c", "a b"], np.arange(2), args.threads)  # compiles
    exact(index(["a b c", "a b"])[0], ["a b c", "a b"], np.arange(2), args.threads)
    figures: dict[str, float] = {}
    if "sacrebleu" in args.parts:
        figures["exact_over_sacrebleu"] = against_sacrebleu(nl2bash(args.data), args.threads)
    if "nl2bash" in args.parts:
        figures["nl2bash_exact_s"] = whole(nl2bash(args.data), args.threads)
    if "bank53k" in args.parts:
        found = compared(wikisql(args.data, args.rows), args.threads, np.arange(args.rows))
        figures["bank53k_exact_s"] = found["ngrams_s"] + found["exact_s"]
        figures["faiss_over_exact"] = found["exact_s"] / found["faiss_s"]
        figures["faiss_bleu_share"] = found["share"]
    if "growth" in args.parts:
        texts = wikisql(args.data, max(args.sizes))
        for size in args.sizes:
            compared(
                texts[:size], args.threads, np.random.default_rng(0).choice(size, min(SAMPLE, size), replace=False)
            )
    last_line(**figures)


if __name__ == "__main__":
    main()
