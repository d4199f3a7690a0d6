"""Metrics agree with sacrebleu and with arithmetic."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from pi_ray.errors import DataError
from pi_ray.tasks.metrics import corpus_bleu, exact_match, mean_interval

ANSWERS = [f"find . -name '*.{i}' -type f | xargs grep -l word{i % 7}" for i in range(60)]
OUTPUTS = [a if i % 3 else a.replace("grep -l", "wc").replace("-type f ", "") for i, a in enumerate(ANSWERS)]


@pytest.mark.parametrize("output, answer, expected", [("a  b\n", "a b", 1), ("a b", "ab", 0), ("A", "a", 0), ("", "a", 0)])
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
    assert corpus_bleu(outputs, answers, 10, 0)[0] == pytest.approx(BLEU().corpus_score(outputs, [answers]).score, abs=1e-9)


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


def test_mean_interval_matches_the_binomial_one():
    values = [1.0] * 150 + [0.0] * 50
    mean, low, high = mean_interval(values, bootstrap=4000, seed=0)
    half = 1.96 * (0.75 * 0.25 / 200) ** 0.5
    assert mean == 0.75 and (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)


def test_the_seed_decides_and_blocks_do_not(monkeypatch):
    values = list(np.random.default_rng(0).random(40))
    whole = mean_interval(values, 300, seed=3)
    assert whole == mean_interval(values, 300, seed=3) != mean_interval(values, 300, seed=4)
    monkeypatch.setattr("pi_ray.tasks.metrics.CELLS", 40 * 7)
    assert mean_interval(values, 300, seed=3) == pytest.approx(whole)


def test_nothing_to_score_is_said():
    with pytest.raises(DataError, match="empty"):
        mean_interval([], 10, 0)
    with pytest.raises(DataError, match="empty"):
        corpus_bleu([], [], 10, 0)
    with pytest.raises(DataError, match="one for each"):
        corpus_bleu(["a"], [], 10, 0)
