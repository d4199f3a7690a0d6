"""Metrics: exact match, corpus BLEU, and means, each with a 95% bootstrap interval over the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from pi_ray.errors import DataError

CELLS = 2_000_000  # resampled row indices held at a time, about 16 MB


def exact_match(output: str, answer: str) -> float:
    """1.0 when both are equal up to runs of whitespace, else 0.0."""
    return float(output.split() == answer.split())


def corpus_bleu(outputs: Sequence[str], answers: Sequence[str], bootstrap: int, seed: int) -> tuple[float, float, float]:
    """(BLEU, low, high) on the scale 0..100: sacrebleu's corpus BLEU (13a, exp smoothing) and the interval of `bootstrap` resamples.

    Sentence statistics are counted once; a resample sums them and sacrebleu scores the sum. Raises DataError without rows.
    """
    if len(outputs) != len(answers):
        raise DataError(f"{len(outputs)} outputs for {len(answers)} answers; there must be one for each")
    bleu = BLEU(tokenize="13a", effective_order=True)  # the order concerns single sentences; only their counts are used
    scores = [bleu.sentence_score(output, [answer]) for output, answer in zip(outputs, answers, strict=True)]
    statistics = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=np.float64).reshape(len(scores), 10)
    sums = _resampled_sums(statistics, bootstrap, seed)
    return _bleu(statistics.sum(axis=0)), *_interval([_bleu(total) for block in sums for total in block])


def mean_interval(values: Sequence[float], bootstrap: int, seed: int) -> tuple[float, float, float]:
    """(mean, low, high) of `values`: the 2.5th and 97.5th percentile of the mean over `bootstrap` resamples. Raises DataError without values."""
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    sums = np.concatenate(list(_resampled_sums(column, bootstrap, seed)))
    return float(column.mean()), *_interval(sums[:, 0] / len(column))


def _bleu(statistics: np.ndarray) -> float:
    """Statistics (matched 1..4-grams, all 1..4-grams, output length, answer length) -> BLEU."""
    counts = [round(v) for v in statistics]
    return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score


def _resampled_sums(statistics: np.ndarray, bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of sums over rows drawn with replacement; together shape (bootstrap, statistics.shape[1])."""
    rows = len(statistics)
    if not rows:
        raise DataError("there is no row to score; the split is empty")
    rng = np.random.default_rng(seed)
    block = max(1, CELLS // rows)
    for start in range(0, bootstrap, block):
        size = min(block, bootstrap - start)
        drawn = rng.integers(0, rows, (size, rows)) + np.arange(size)[:, None] * rows
        times = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)  # how often each row was drawn
        yield times @ statistics


def _interval(resampled: Sequence[float] | np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
