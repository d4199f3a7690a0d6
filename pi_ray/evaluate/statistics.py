"""Statistics of metrics: means and corpus BLEU with 95% bootstrap intervals over the rows, and differences of columns.

Two columns answer the same rows, so their difference is resampled row by row (paired), which sees much smaller
differences than two intervals side by side. `over_seeds` and `gap_recovered` resample the training seeds too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from pi_ray.errors import DataError

CELLS = 2_000_000  # resampled row indices in memory at a time, about 16 MB
EXACT = 16  # up to as many rows that differ, all 2^rows sign flips are counted
NEAR = 1e-9  # relative; sums of the same numbers in another order are ties


def corpus_bleu(
    outputs: Sequence[str], answers: Sequence[str], bootstrap: int, seed: int
) -> tuple[float, float, float]:
    """(BLEU, low, high), 0..100: sacrebleu's corpus BLEU (13a, exp smoothing), interval of `bootstrap` resamples.

    A resample sums the statistics of its rows, and sacrebleu scores the sum. Raises DataError without rows.
    """
    statistics = bleu_statistics(outputs, answers)
    sums = _resampled_sums(statistics, bootstrap, seed)
    return bleu_of(statistics.sum(axis=0)), *_interval([bleu_of(total) for block in sums for total in block])


def bleu_statistics(outputs: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Shape (rows, 10): matched 1..4-grams, all 1..4-grams of the output, output length, answer length, in 13a tokens.

    `bleu_of` scores their sum over any rows. Raises DataError unless there is one output for each answer.
    """
    if len(outputs) != len(answers):
        raise DataError(f"{len(outputs)} outputs for {len(answers)} answers; there must be one for each")
    bleu = BLEU(tokenize="13a", effective_order=True)  # the order concerns single sentences; only their counts are used
    scores = [bleu.sentence_score(output, [answer]) for output, answer in zip(outputs, answers, strict=True)]
    counts = [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores]
    return np.array(counts, dtype=np.float64).reshape(len(scores), 10)


def bleu_of(statistics: np.ndarray) -> float:
    """Summed `bleu_statistics`, shape (10,) -> BLEU, 0..100."""
    counts = [round(v) for v in statistics]
    return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score


def mean_interval(values: Sequence[float] | np.ndarray, bootstrap: int, seed: int) -> tuple[float, float, float]:
    """(mean, low, high): the 2.5th and 97.5th percentile of the mean over `bootstrap` resamples.

    Raises DataError without values.
    """
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    sums = np.concatenate(list(_resampled_sums(column, bootstrap, seed)))
    return float(column.mean()), *_interval(sums[:, 0] / len(column))


def paired_mean(
    a: Sequence[float], b: Sequence[float], bootstrap: int, seed: int
) -> tuple[float, float, float, float]:
    """(difference, low, high, p) of mean(a) - mean(b), scores of two columns on the same rows in the same order.

    The interval is the paired bootstrap's. p is two-sided, of the permutation test that flips the sign of a row's
    difference (Fisher 1935): exact when at most EXACT rows differ (on 0/1 scores McNemar's exact test), else of
    `bootstrap` random flips as (k + 1) / (bootstrap + 1). Raises DataError for unequal lengths or no rows.
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} scores against {len(b)}; paired columns have one for each row")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return *mean_interval(differences, bootstrap, seed), _sign_flip(differences, bootstrap, seed)


def paired_bleu(
    outputs_a: Sequence[str], outputs_b: Sequence[str], answers: Sequence[str], bootstrap: int, seed: int
) -> tuple[float, float, float, float]:
    """(difference, low, high, p) of BLEU(a) - BLEU(b), in points of 0..100, for two columns on the same rows.

    The interval is the paired bootstrap's (Koehn 2004). p is two-sided, by approximate randomisation (Riezler and
    Maxwell 2005): a row's outputs change sides or stay, `bootstrap` times, and p = (k + 1) / (bootstrap + 1). Raises
    DataError for unequal lengths or no rows.
    """
    a, b = bleu_statistics(outputs_a, answers), bleu_statistics(outputs_b, answers)
    sums = chain.from_iterable(_resampled_sums(np.hstack([a, b]), bootstrap, seed))
    resampled = [bleu_of(s[:10]) - bleu_of(s[10:]) for s in sums]
    ours, theirs = a.sum(axis=0), b.sum(axis=0)
    found = bleu_of(ours) - bleu_of(theirs)
    moves = chain.from_iterable(block @ (b - a) for block in _coins(len(a), bootstrap, seed))
    swapped = (bleu_of(ours + moved) - bleu_of(theirs - moved) for moved in moves)
    as_far = sum(abs(difference) >= abs(found) - 100 * NEAR for difference in swapped)
    return found, *_interval(resampled), (as_far + 1) / (bootstrap + 1)


Score = Callable[[np.ndarray], float]  # rows of one seed, shape (rows, ...) -> a number


def over_seeds(
    values_by_seed: Sequence[Any], bootstrap: int, seed: int, score: Score = np.mean
) -> tuple[float, float, float]:
    """(score, low, high) of arrays of shape (training seeds, rows, ...).

    The interval covers the luck of training as well as the choice of rows: seeds are resampled, and rows, the same for
    all seeds since each answers the same test rows. With few seeds it is too narrow: of n seeds the bootstrap sees
    (n - 1) / n of the variance between them. Raises DataError without values, or when a seed lacks rows.
    """
    scores, drawn = _scores_over_seeds([values_by_seed], bootstrap, _rng(seed, "seeds"), score)
    return float(scores[0]), *_interval(drawn[:, 0])


def difference_over_seeds(
    a: Sequence[Any], b: Sequence[Any], bootstrap: int, seed: int, score: Score = np.mean
) -> tuple[float, float, float]:
    """(difference, low, high) of score(a) - score(b), resampled as by `over_seeds`: the same rows, but other seeds."""
    scores, drawn = _scores_over_seeds([a, b], bootstrap, _rng(seed, "seeds"), score)
    return float(scores[0] - scores[1]), *_interval(drawn[:, 0] - drawn[:, 1])


def gap_recovered(columns: Sequence[Any], score: Score, bootstrap: int, seed: int) -> tuple[float, float, float, bool]:
    """(value, low, high, resolved) of (PromptIntern - no template) / (full prompt - no template).

    0 is none of the gap, 1 all of it. `columns` are these three in this order, each of shape (seeds, rows) or (seeds,
    rows, statistics), the same rows in all; seeds may differ in number (the untrained base has one). `score` takes the
    rows of one seed, (rows, ...): `np.mean`, or `lambda s: bleu_of(s.sum(axis=0))`; a column scores the mean over its
    seeds. A resample draws rows for all columns alike, and seeds for each column by itself.

    `resolved` is False, and the numbers NaN, unless the full prompt is better than no template with its 95% interval
    above 0: otherwise there is no gap to recover at this size, and the ratio would be noise. Raises DataError for
    columns of other rows or without any.
    """
    (mine, none, full), drawn = _scores_over_seeds(columns, bootstrap, _rng(seed, "gap"), score)
    gains, gaps = drawn[:, 0] - drawn[:, 1], drawn[:, 2] - drawn[:, 1]
    if min(full - none, _interval(gaps)[0]) <= 0:
        return math.nan, math.nan, math.nan, False
    # at most 1 in 40 resamples has no gap; one of almost 0 makes these the most extreme, and not of the wrong sign
    return float((mine - none) / (full - none)), *_interval(gains / np.maximum(gaps, NEAR * (full - none))), True


def _scores_over_seeds(
    columns: Sequence[Any], bootstrap: int, rng: np.random.Generator, score: Score
) -> tuple[list[Any], np.ndarray]:
    """The mean score of each column over its seeds, and those of resamples, shape (bootstrap, columns)."""
    arrays = [_by_seed(c) for c in columns]
    if len({a.shape[1] for a in arrays}) != 1:
        raise DataError(f"columns of {', '.join(str(a.shape[1]) for a in arrays)} rows; all need the same rows")
    rows = arrays[0].shape[1]
    picks = (rng.integers(0, rows, (rows,)) for _ in range(bootstrap))
    drawn = [[_resampled_score(a, picked, score, rng) for a in arrays] for picked in picks]
    return [np.mean([score(seed) for seed in a]) for a in arrays], np.array(drawn)


def _resampled_score(column: np.ndarray, rows: np.ndarray, score: Score, rng: np.random.Generator) -> float:
    """Mean score over seeds drawn with replacement, on the given rows."""
    times = np.bincount(rng.integers(0, len(column), len(column)), minlength=len(column))
    return sum(n * score(column[i, rows]) for i, n in enumerate(times) if n) / len(column)


def _by_seed(values: Any) -> np.ndarray:
    """An array of shape (seeds, rows, ...) with at least one of each; else DataError."""
    if len({len(one) for one in values}) > 1:
        lengths = ", ".join(str(len(one)) for one in values)
        raise DataError(f"seeds with {lengths} rows; every seed answers the same test rows")
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise DataError("there is no row to score; the split is empty")
    return array


def _sign_flip(differences: np.ndarray, flips: int, seed: int) -> float:
    """Two-sided p. Rows without a difference are left out: a flip does not change them."""
    moved = differences[differences != 0]
    least = abs(moved.sum()) - NEAR * np.abs(moved).sum()
    if len(moved) <= EXACT:
        every = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float(np.mean(np.abs((1 - 2 * every) @ moved) >= least))
    as_far = sum(int((np.abs((1 - 2 * block) @ moved) >= least).sum()) for block in _coins(len(moved), flips, seed))
    return (as_far + 1) / (flips + 1)


def _coins(rows: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of fair 0 or 1; together shape (draws, rows)."""
    rng, block = _rng(seed, "coins"), max(1, CELLS // rows)
    for start in range(0, draws, block):
        yield rng.integers(0, 2, (min(block, draws - start), rows))


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """An independent generator for each purpose."""
    return np.random.default_rng([seed, *purpose.encode()])


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
