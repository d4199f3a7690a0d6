"""Statistics of metrics: means and corpus BLEU with 95% bootstrap intervals over the rows, and differences of columns.

Two columns answer the same rows, so their difference is resampled row by row (paired), which sees much smaller
differences than two intervals side by side. `over_seeds` and `gap_recovered` resample the training seeds too.

Where rows come in clusters, such as the turns of one conversation, `clusters` names that of each row: then clusters are
resampled and change sides as a whole, since their rows are alike (Rao and Scott 1992).

Every function raises DataError where there are no rows, or where what is compared has not the same rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from pi_ray.errors import DataError

EXACT = 16  # up to as many rows that differ, all 2^rows sign flips are counted
NEAR = 1e-9  # relative; sums of the same numbers in another order are ties
NO_ROWS = "there is no row to score; the split is empty"

Interval = tuple[float, float, float]  # value, low, high
Difference = tuple[float, float, float, float]  # difference, low, high, p
Score = Callable[[np.ndarray], float]  # rows of one seed, shape (rows, ...) -> a number
Clusters = Sequence[str] | None  # of each row; None: every row by itself


def corpus_bleu(
    outputs: Sequence[str], answers: Sequence[str], bootstrap: int, seed: int, clusters: Clusters = None
) -> Interval:
    """sacrebleu's corpus BLEU (13a, exp smoothing), 0..100; it also scores the summed statistics of each resample."""
    statistics = sum_clusters(bleu_statistics(outputs, answers), clusters)
    resampled = [bleu_of(total) for total in _resampled_sums(statistics, bootstrap, seed)]
    return bleu_of(statistics.sum(axis=0)), *_interval(resampled)


def bleu_statistics(outputs: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Shape (rows, 10): matched 1..4-grams, all 1..4-grams of the output, output length, answer length, in 13a tokens.

    `bleu_of` scores their sum over any rows.
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


def mean_interval(
    values: Sequence[float] | np.ndarray, bootstrap: int, seed: int, clusters: Clusters = None
) -> Interval:
    """The mean, and the 2.5th and 97.5th percentile of the mean over `bootstrap` resamples."""
    column = np.asarray(values, dtype=np.float64)
    if clusters is None:
        sums = np.array(list(_resampled_sums(column, bootstrap, seed)))
        return float(column.mean()), *_interval(sums / len(column))
    counted = sum_clusters(np.stack([column, np.ones_like(column)], axis=1), clusters)
    drawn = np.array(list(_resampled_sums(counted, bootstrap, seed)))  # clusters differ in rows
    return float(column.mean()), *_interval(drawn[:, 0] / drawn[:, 1])


def score_interval(
    values: Sequence[float] | np.ndarray, bootstrap: int, seed: int, clusters: Clusters = None
) -> Interval:
    """As `mean_interval`, of scores from 0 to 1. Where all rows have 0, or all 1, every resample is the same.

    Then the other end is the exact binomial one for so many rows, or clusters (Clopper and Pearson 1934).
    """
    draws = len(values if clusters is None else set(clusters))
    return exact_ends(mean_interval(values, bootstrap, seed, clusters), values, draws)


def exact_ends(found: Interval, values: Sequence[float] | np.ndarray, draws: int) -> Interval:
    """An interval of the mean of `values` from 0 to 1, as `score_interval` has it for so many rows or clusters."""
    mean, low, high = found
    bound = 0.025 ** (1 / draws)
    return mean, (bound if np.min(values) == 1 else low), (1 - bound if np.max(values) == 0 else high)


def paired_mean(
    a: Sequence[float], b: Sequence[float], bootstrap: int, seed: int, clusters: Clusters = None
) -> Difference:
    """mean(a) - mean(b), of scores on the same rows in the same order, with the paired bootstrap's interval.

    p is two-sided, of the permutation test that flips the sign of a row's difference (Fisher 1935): exact when at most
    EXACT rows differ (on 0/1 scores McNemar's exact test), else of `bootstrap` random flips, (k + 1) / (bootstrap + 1).
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} scores against {len(b)}; paired columns have one for each row")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    flipped = sum_clusters(differences, clusters)
    return *mean_interval(differences, bootstrap, seed, clusters), _sign_flip(flipped, bootstrap, seed)


def paired_bleu(
    outputs_a: Sequence[str], outputs_b: Sequence[str], answers: Sequence[str], bootstrap: int, seed: int,
    clusters: Clusters = None,
) -> Difference:
    """BLEU(a) - BLEU(b), in points of 0..100, with the paired bootstrap's interval (Koehn 2004).

    p is two-sided, by approximate randomisation (Riezler and Maxwell 2005): a row's outputs change sides or stay,
    `bootstrap` times, and p = (k + 1) / (bootstrap + 1).
    """
    a, b = (sum_clusters(bleu_statistics(texts, answers), clusters) for texts in (outputs_a, outputs_b))
    resampled = [bleu_of(s[:10]) - bleu_of(s[10:]) for s in _resampled_sums(np.hstack([a, b]), bootstrap, seed)]
    ours, theirs = a.sum(axis=0), b.sum(axis=0)
    found = bleu_of(ours) - bleu_of(theirs)
    moves = (coins @ (b - a) for coins in _coins(len(a), bootstrap, seed))
    swapped = (bleu_of(ours + moved) - bleu_of(theirs - moved) for moved in moves)
    as_far = sum(abs(difference) >= abs(found) - 100 * NEAR for difference in swapped)
    return found, *_interval(resampled), (as_far + 1) / (bootstrap + 1)


def over_seeds(values_by_seed: Sequence[Any], bootstrap: int, seed: int, score: Score = np.mean) -> Interval:
    """The score of arrays of shape (training seeds, rows, ...).

    The interval covers the luck of training as well as the choice of rows: seeds are resampled, and rows, the same for
    all seeds. With few seeds it is too narrow: of n seeds the bootstrap sees (n - 1) / n of the variance between them.
    """
    scores, drawn = _scores_over_seeds([values_by_seed], bootstrap, _rng(seed, "seeds"), score)
    return float(scores[0]), *_interval(drawn[:, 0])


def difference_over_seeds(
    a: Sequence[Any], b: Sequence[Any], bootstrap: int, seed: int, score: Score = np.mean
) -> Interval:
    """score(a) - score(b), resampled as by `over_seeds`: the same rows, but other seeds."""
    scores, drawn = _scores_over_seeds([a, b], bootstrap, _rng(seed, "seeds"), score)
    return float(scores[0] - scores[1]), *_interval(drawn[:, 0] - drawn[:, 1])


def gap_recovered(columns: Sequence[Any], score: Score, bootstrap: int, seed: int) -> tuple[float, float, float, bool]:
    """(value, low, high, resolved) of (PromptIntern - no template) / (full prompt - no template).

    `columns` are these three in this order, each of shape (seeds, rows, ...), the same rows in all; seeds may differ in
    number. A column scores its seeds' mean. A resample draws rows for all columns alike, and seeds column by column.
    `resolved` is False, and the numbers NaN, unless the full prompt is better than no template with its 95% interval
    above 0: otherwise there is no gap to recover, and the ratio would be noise.
    """
    (mine, none, full), drawn = _scores_over_seeds(columns, bootstrap, _rng(seed, "gap"), score)
    gains, gaps = drawn[:, 0] - drawn[:, 1], drawn[:, 2] - drawn[:, 1]
    if min(full - none, _interval(gaps)[0]) <= 0:
        return math.nan, math.nan, math.nan, False
    # Up to 1 in 40 resamples may have a gap of 0 or less. Raised to a tiny one, it makes their ratios very large and
    # keeps their sign.
    return float((mine - none) / (full - none)), *_interval(gains / np.maximum(gaps, NEAR * (full - none))), True


def _scores_over_seeds(
    columns: Sequence[Any], bootstrap: int, rng: np.random.Generator, score: Score
) -> tuple[list[Any], np.ndarray]:
    """The mean score of each column over its seeds, and those of resamples, shape (bootstrap, columns)."""
    for column in columns:
        lengths = [len(of_seed) for of_seed in column]
        if len(set(lengths)) > 1:
            raise DataError(f"seeds with {', '.join(map(str, lengths))} rows; every seed answers the same test rows")
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]  # (seeds, rows, ...)
    if not all(a.size for a in arrays):
        raise DataError(NO_ROWS)
    if len({a.shape[1] for a in arrays}) != 1:
        raise DataError(f"columns of {', '.join(str(a.shape[1]) for a in arrays)} rows; all need the same rows")
    rows = arrays[0].shape[1]

    def resampled(column: np.ndarray, picked: np.ndarray) -> float:
        """Mean score over seeds drawn with replacement, on the picked rows."""
        times = np.bincount(rng.integers(0, len(column), len(column)), minlength=len(column))
        return sum(n * score(column[i, picked]) for i, n in enumerate(times) if n) / len(column)

    picks = (rng.integers(0, rows, (rows,)) for _ in range(bootstrap))
    drawn = [[resampled(a, picked) for a in arrays] for picked in picks]
    return [np.mean([score(of_seed) for of_seed in a]) for a in arrays], np.array(drawn)


def sum_clusters(statistics: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Sums over the rows of each cluster, in the order in which clusters first occur."""
    if clusters is None:
        return statistics
    place = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(place), *statistics.shape[1:]))
    np.add.at(sums, [place[name] for name in clusters], statistics)
    return sums


def _sign_flip(differences: np.ndarray, flips: int, seed: int) -> float:
    """Two-sided p. Rows without a difference are left out: a flip does not change them."""
    moved = differences[differences != 0]
    least = abs(moved.sum()) - NEAR * np.abs(moved).sum()
    if len(moved) <= EXACT:
        every = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float(np.mean(np.abs((1 - 2 * every) @ moved) >= least))
    as_far = sum(abs(((1 - 2 * coins) * moved).sum()) >= least for coins in _coins(len(moved), flips, seed))
    return float((as_far + 1) / (flips + 1))


def _coins(rows: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """For each draw a fair 0 or 1 for each row."""
    rng = _rng(seed, "coins")
    return (rng.integers(0, 2, rows) for _ in range(draws))


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """An independent generator for each purpose."""
    return np.random.default_rng([seed, *purpose.encode()])


def _resampled_sums(statistics: np.ndarray, bootstrap: int, seed: int) -> Iterator[Any]:
    """Sums over rows drawn with replacement, each of shape statistics.shape[1:]."""
    rows, rng = len(statistics), np.random.default_rng(seed)
    if not rows:
        raise DataError(NO_ROWS)
    for _ in range(bootstrap):
        times = np.bincount(rng.integers(0, rows, rows), minlength=rows)  # how often each row was drawn
        yield (times * statistics.T).sum(axis=-1)  # `@` is slower: BLAS starts threads for each short vector


def _interval(resampled: Sequence[float] | np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
