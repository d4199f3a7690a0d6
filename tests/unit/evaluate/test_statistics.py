"""Metrics agree with sacrebleu and with arithmetic, differences with brute force, and their intervals cover the
truth.
"""

import itertools
import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from pi_ray.errors import DataError
from pi_ray.evaluate.statistics import (
    bleu_of,
    bleu_statistics,
    corpus_bleu,
    gap_recovered,
    mean_interval,
    over_seeds,
    paired_bleu,
    paired_mean,
    score_interval,
)
from pi_ray.metrics import exact_match

ANSWERS = [f"find . -name '*.{i}' -type f | xargs grep -l word{i % 7}" for i in range(60)]
WORSE = [a.replace("find", "ls").replace("xargs", "cat") for a in ANSWERS]
OUTPUTS = [a if i % 3 else a.replace("grep -l", "wc").replace("-type f ", "") for i, a in enumerate(ANSWERS)]


@pytest.mark.parametrize(
    "output, answer, expected", [("a  b\n", "a b", 1), ("a b", "ab", 0), ("A", "a", 0), ("", "a", 0)]
)
def test_exact_match_ignores_runs_of_white_space_only(output, answer, expected):
    assert exact_match(output, answer) == expected


def test_corpus_bleu_is_sacrebleus():
    score, low, high = corpus_bleu(OUTPUTS, ANSWERS, bootstrap=500, seed=0)
    assert score == pytest.approx(BLEU(tokenize="13a").corpus_score(OUTPUTS, [ANSWERS]).score, abs=1e-9)
    assert 0 < low < score < high < 100


@pytest.mark.parametrize("outputs, answers", [
    (["ls -l", "pwd", "cat b"], ["ls -a", "pwd", "cat a"]),
    (["sort -n a b c d"], ["sort -n a x c d"]),
], ids=["no four-grams at all", "no four-gram that matches"])
def test_a_short_corpus_scores_as_in_sacrebleu(outputs, answers):
    assert corpus_bleu(outputs, answers, 10, 0)[0] == pytest.approx(
        BLEU().corpus_score(outputs, [answers]).score, abs=1e-9
    )


def test_bleu_interval_agrees_with_scoring_the_resampled_rows_themselves():
    rng, scores = np.random.default_rng(5), []
    for _ in range(300):
        drawn = rng.integers(0, len(ANSWERS), len(ANSWERS))
        scores.append(BLEU().corpus_score([OUTPUTS[i] for i in drawn], [[ANSWERS[i] for i in drawn]]).score)
    _, low, high = corpus_bleu(OUTPUTS, ANSWERS, bootstrap=4000, seed=1)
    assert (low, high) == pytest.approx(np.percentile(scores, [2.5, 97.5]), abs=1.0)


def test_perfect_and_hopeless_outputs_have_tight_intervals():
    assert corpus_bleu(ANSWERS, ANSWERS, 50, 0) == pytest.approx((100, 100, 100))
    assert corpus_bleu([""] * len(ANSWERS), ANSWERS, 50, 0) == (0, 0, 0)


def test_scores_that_are_all_alike_have_the_exact_binomial_interval():
    """As the upper bound p of no success in n rows has it: (1 - p)^n = 2.5%."""
    mean, low, high = score_interval([0.0] * 120, 100, seed=0)
    assert (mean, low) == (0, 0) and (1 - high) ** 120 == pytest.approx(0.025)
    assert score_interval([1.0] * 120, 100, seed=0) == pytest.approx((1, 1 - high, 1))
    clusters = [str(i // 10) for i in range(120)]
    assert score_interval([1.0] * 120, 100, 0, clusters)[1] ** 12 == pytest.approx(0.025)
    assert score_interval([0.5] * 9, 100, seed=0) == (0.5, 0.5, 0.5)
    mixed = [0.0, 1.0, 1.0, 1.0]
    assert score_interval(mixed, 100, seed=0) == mean_interval(mixed, 100, seed=0)


def test_mean_interval_matches_the_binomial_one():
    values = [1.0] * 150 + [0.0] * 50
    mean, low, high = mean_interval(values, bootstrap=4000, seed=0)
    half = 1.96 * (0.75 * 0.25 / 200) ** 0.5
    assert mean == 0.75 and (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)


def test_the_seed_decides():
    values = list(np.random.default_rng(0).random(40))
    found = mean_interval(values, 300, seed=3)
    assert found == mean_interval(values, 300, seed=3) != mean_interval(values, 300, seed=4)


def test_nothing_to_score_is_said():
    with pytest.raises(DataError, match="empty"):
        mean_interval([], 10, 0)
    with pytest.raises(DataError, match="empty"):
        corpus_bleu([], [], 10, 0)
    with pytest.raises(DataError, match="one for each"):
        corpus_bleu(["a"], [], 10, 0)


def test_bleu_statistics_of_any_rows_add_up_to_sacrebleus_corpus_score():
    statistics, rows = bleu_statistics(OUTPUTS, ANSWERS), [3, 3, 7, 20]
    expected = BLEU().corpus_score([OUTPUTS[i] for i in rows], [[ANSWERS[i] for i in rows]]).score
    assert statistics.shape == (60, 10) and bleu_of(statistics[rows].sum(axis=0)) == pytest.approx(expected, abs=1e-9)


def test_paired_mean_counts_every_flip_of_a_small_example():
    a, b = np.array([0.9, 0.5, 0.7, 0.3, 1.0, 0.2]), np.array([0.4, 0.6, 0.1, 0.3, 0.8, 0.0])
    difference, low, high, p = paired_mean(a, b, 2000, seed=0)
    flipped = [abs(np.dot(signs, a - b)) for signs in itertools.product([-1, 1], repeat=6)]
    assert difference == pytest.approx(np.mean(a - b)) and low < difference < high
    assert p == np.mean(np.array(flipped) >= abs(np.sum(a - b)) - 1e-9)


def test_on_zeros_and_ones_the_paired_p_is_mcnemars():
    a, b = [1.0] * 9 + [0.0] * 2 + [1.0] * 500, [0.0] * 9 + [1.0] * 2 + [1.0] * 500
    assert paired_mean(a, b, 50, 0)[3] == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)


def test_random_flips_agree_with_the_normal_approximation_and_are_corrected():
    d = np.random.default_rng(2).normal(0.15, 1, 200)
    p = paired_mean(d, np.zeros(200), 20_000, seed=0)[3]
    assert p == pytest.approx(math.erfc(abs(d.sum()) / math.sqrt((d**2).sum()) / math.sqrt(2)), abs=0.01)
    assert paired_mean([1.0] * 200, [0.0] * 200, 999, seed=0)[3] == 1 / 1000


def test_the_paired_interval_sees_what_two_intervals_side_by_side_do_not():
    b = np.random.default_rng(3).random(100)
    a = b + np.linspace(0, 0.04, 100)
    assert mean_interval(a, 500, 0)[1] < mean_interval(b, 500, 0)[2]
    assert paired_mean(a, b, 500, 0)[1] > 0


def test_paired_intervals_cover_the_truth():
    rng, covered = np.random.default_rng(4), 0
    for i in range(200):
        row = rng.normal(0, 1, 80)
        _, low, high, _ = paired_mean(row + rng.normal(0.3, 0.5, 80), row, 300, seed=i)
        covered += low < 0.3 < high
    assert 180 <= covered <= 198


def test_identical_columns_do_not_differ():
    assert paired_mean([0.2, 0.4] * 20, [0.2, 0.4] * 20, 100, 0) == (0, 0, 0, 1)
    assert paired_bleu(OUTPUTS, list(OUTPUTS), ANSWERS, 100, 0) == (0, 0, 0, 1)


def test_paired_bleu_is_the_difference_of_sacrebleus_scores_with_a_tiny_p():
    difference, low, high, p = paired_bleu(OUTPUTS, WORSE, ANSWERS, 1000, seed=0)
    assert difference == pytest.approx(
        BLEU().corpus_score(OUTPUTS, [ANSWERS]).score - BLEU().corpus_score(WORSE, [ANSWERS]).score, abs=1e-9
    )
    assert 0 < low < difference < high and p == 1 / 1001
    assert paired_bleu(WORSE, OUTPUTS, ANSWERS, 1000, seed=0) == pytest.approx((-difference, -high, -low, p))


def test_paired_bleu_p_is_sacrebleus_own():
    near = [
        a.replace("word", "text") if i % 7 == 0 else o for i, (a, o) in enumerate(zip(ANSWERS, OUTPUTS, strict=True))
    ]
    theirs = PairedTest(
        [("b", near), ("a", OUTPUTS)], {"BLEU": BLEU(references=[ANSWERS])}, references=None, test_type="ar",
        n_samples=4000,
    )()[1]["BLEU"][1].p_value
    assert 0.01 < theirs < 0.9
    assert paired_bleu(OUTPUTS, near, ANSWERS, 4000, seed=0)[3] == pytest.approx(theirs, abs=0.03)


def test_paired_bleu_interval_agrees_with_scoring_the_resampled_rows_themselves():
    rng, differences = np.random.default_rng(6), []
    for _ in range(300):
        drawn = rng.integers(0, 60, 60)
        answers = [[ANSWERS[i] for i in drawn]]
        differences.append(
            BLEU().corpus_score([OUTPUTS[i] for i in drawn], answers).score
            - BLEU().corpus_score([WORSE[i] for i in drawn], answers).score
        )
    assert paired_bleu(OUTPUTS, WORSE, ANSWERS, 2000, seed=1)[1:3] == pytest.approx(
        np.percentile(differences, [2.5, 97.5]), abs=1.0
    )


def test_over_seeds_agrees_with_a_bootstrap_by_hand():
    values = np.random.default_rng(7).random((4, 50)) + np.array([[0], [0.1], [0.2], [0.5]])
    rng = np.random.default_rng(8)
    by_hand = [values[np.ix_(rng.integers(0, 4, 4), rng.integers(0, 50, 50))].mean() for _ in range(8000)]
    mean, low, high = over_seeds(values, 8000, seed=0)
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx(
        np.percentile(by_hand, [2.5, 97.5]), abs=0.01
    )


def test_one_seed_has_the_interval_over_rows_and_seeds_that_differ_a_wider_one():
    row = np.random.default_rng(9).random(100)
    assert over_seeds([row], 500, 3) == pytest.approx(mean_interval(row, 500, 3), abs=0.01)
    _, low, high = over_seeds([row - 0.3, row, row + 0.3], 500, 3)
    assert high - low > 2 * (mean_interval(row, 500, 3)[2] - mean_interval(row, 500, 3)[1])


def test_intervals_over_seeds_cover_the_truth():
    rng, covered = np.random.default_rng(10), 0
    for i in range(100):
        values = 0.5 + rng.normal(0, 0.1, (10, 1)) + rng.normal(0, 0.3, 60) + rng.normal(0, 0.2, (10, 60))
        _, low, high = over_seeds(values, 300, seed=i)
        covered += low < 0.5 < high
    assert covered >= 88


def gap(rng, mine=0.6, seeds=8):
    """Made columns whose true means are `mine`, 0.2 (no template) and 0.7 (full prompt, one seed)."""
    row = rng.normal(0, 0.1, 150)
    return [
        mean + row + rng.normal(0, 0.02, (n, 1)) + rng.normal(0, 0.2, (n, 150))
        for mean, n in ((mine, seeds), (0.2, seeds), (0.7, 1))
    ]


def test_the_gap_recovered_is_the_ratio_of_means_and_its_interval_covers_the_truth():
    rng, covered = np.random.default_rng(11), 0
    for i in range(40):
        columns = gap(rng)
        value, low, high, resolved = gap_recovered(columns, np.mean, 200, seed=i)
        a, b, c = (column.mean() for column in columns)
        assert resolved and value == pytest.approx((a - b) / (c - b)) and low < value < high
        covered += low < (0.6 - 0.2) / (columns[2].mean() - 0.2) < high  # the full prompt's one seed is what it is
    assert covered >= 35


def test_the_gap_recovered_in_bleu_is_that_of_sacrebleus_scores():
    full, none, mine = (bleu_statistics(o, ANSWERS) for o in (ANSWERS, WORSE, OUTPUTS))
    value, low, high, resolved = gap_recovered(
        [[mine, mine], [none, none], [full]], lambda s: bleu_of(s.sum(axis=0)), 200, seed=0
    )
    bottom = BLEU().corpus_score(WORSE, [ANSWERS]).score
    assert resolved and value == pytest.approx(
        (BLEU().corpus_score(OUTPUTS, [ANSWERS]).score - bottom) / (100 - bottom)
    )
    assert 0 < low < value < high < 1


@pytest.mark.parametrize("full", [0.5, 0.2], ids=["no better", "worse"])
def test_a_full_prompt_that_gains_nothing_leaves_no_gap(full):
    rng = np.random.default_rng(12)
    mine, none, full = (mean + rng.normal(0, 0.3, (3, 40)) for mean in (0.8, 0.5, full))
    value, low, high, resolved = gap_recovered([mine, none, full], np.mean, 300, seed=0)
    assert resolved is False and all(map(math.isnan, (value, low, high)))


def test_a_gap_that_is_barely_there_has_a_wide_interval_of_the_right_sign():
    rng = np.random.default_rng(13)
    none, noise = rng.normal(0, 1, (1, 200)), rng.normal(0, 1, (1, 200))
    # about 2 standard errors above: some resamples have no gap at all
    full = none + noise - noise.mean() + 2.2 * noise.std() / 200**0.5
    value, low, high, resolved = gap_recovered([none + 1, none, full], np.mean, 2000, seed=0)
    assert resolved and 0 < low < value < high and high > 5 * value


@pytest.mark.parametrize("found", [
    lambda seed: paired_mean([float(i % 3) for i in range(60)], [float(i % 2) for i in range(60)], 300, seed),
    lambda seed: paired_bleu(OUTPUTS, ANSWERS[:30] + WORSE[30:], ANSWERS, 300, seed),
    lambda seed: over_seeds(np.arange(60.0).reshape(3, 20), 300, seed),
    lambda seed: gap_recovered(gap(np.random.default_rng(0)), np.mean, 300, seed),
], ids=["paired_mean", "paired_bleu", "over_seeds", "gap_recovered"])
def test_differences_too_depend_on_the_seed_and_nothing_else(found):
    assert found(3) == found(3) != found(4)


def test_columns_that_are_no_pair_are_refused():
    with pytest.raises(DataError, match="one for each row"):
        paired_mean([1.0], [1.0, 0.0], 10, 0)
    with pytest.raises(DataError, match="empty"):
        paired_mean([], [], 10, 0)
    with pytest.raises(DataError, match="one for each"):
        paired_bleu(["a", "b"], ["a"], ["a", "b"], 10, 0)
    with pytest.raises(DataError, match="empty"):
        paired_bleu([], [], [], 10, 0)
    with pytest.raises(DataError, match="2, 1 rows"):
        over_seeds([[1.0, 0.0], [1.0]], 10, 0)
    for nothing in ([], [[]]):
        with pytest.raises(DataError, match="empty"):
            over_seeds(nothing, 10, 0)
    with pytest.raises(DataError, match="2, 2, 3 rows"):
        gap_recovered([[[1.0, 1.0]], [[0.0, 0.0]], [[1.0, 1.0, 1.0]]], np.mean, 10, 0)


def test_rows_of_one_cluster_are_drawn_together():
    """Each row three times over tells nothing new, and its interval is that of the rows themselves."""
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    repeated, clusters = [v for v in values for _ in range(3)], [str(i) for i in range(10) for _ in range(3)]
    alone = mean_interval(values, 2000, 0)
    assert mean_interval(repeated, 2000, 0, clusters) == pytest.approx(alone)
    wide, narrow = alone[2] - alone[1], np.subtract(*mean_interval(repeated, 2000, 0)[:0:-1])
    assert narrow < 0.7 * wide


def test_differences_of_one_cluster_change_sides_together():
    worse = [0.0] * 10
    values = [1.0] * 5 + [0.0] * 5
    repeated, clusters = [v for v in values for _ in range(3)], [str(i) for i in range(10) for _ in range(3)]
    p = paired_mean(values, worse, 200, 0)[3]
    assert p == paired_mean(repeated, worse * 3, 200, 0, clusters)[3] == 2 / 2**5
    assert paired_mean(repeated, worse * 3, 200, 0)[3] < p


def test_bleu_of_clusters_is_that_of_their_rows_with_a_wider_interval():
    clusters = [str(i // 12) for i in range(len(ANSWERS))]
    alone, together = corpus_bleu(OUTPUTS, ANSWERS, 500, 0), corpus_bleu(OUTPUTS, ANSWERS, 500, 0, clusters)
    assert together[0] == alone[0]
    assert paired_bleu(OUTPUTS, WORSE, ANSWERS, 200, 0, clusters)[0] == paired_bleu(OUTPUTS, WORSE, ANSWERS, 200, 0)[0]
    # clusters of one row each are rows
    assert corpus_bleu(OUTPUTS, ANSWERS, 500, 0, [str(i) for i in range(len(ANSWERS))]) == alone
