"""The vectorised BLEU says what sacrebleu says."""

import random

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from pi_ray.retrieve.bleu import BleuIndex

SENTENCE = BLEU(effective_order=True)
REAL = [
    "find . -name '*.py' -type f | xargs grep -n \"def main\"",
    "find . -name '*.txt' -type f -print0 | xargs -0 rm",
    "from r9 | lat > 250 | for 15m | to fern",
    "from r9 | lat > 250 | for 5m | to moss",
    "SELECT COUNT(*) FROM t WHERE a >= 3.14 AND b <> 'x-ray';",
    "tar -xzf archive.tar.gz -C /tmp && ls -la",
    "the the the the cat",
    "the cat the",
]
ODD = ["", " ", "a", "a b", "a b c", "ünïcödé – ça va? 日本語 テスト", "&quot;quoted&quot; &lt;tag&gt;", "line one\nline two-\nwrapped", "1,000.50-3", "\u00a0x\u2003y"]


def sacrebleu(hypothesis: str, reference: str) -> float:
    return SENTENCE.sentence_score(hypothesis, [reference]).score


def random_texts(seed: int, count: int, vocabulary: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(vocabulary)}" for _ in range(rng.randrange(0, 20))) for _ in range(count)]


@pytest.mark.parametrize("bank", [REAL + ODD, random_texts(1, 40, 3), random_texts(2, 40, 50)], ids=["real and odd", "repetitive", "sparse"])
def test_every_pair_equals_sacrebleu(bank):
    references = bank[::2] + REAL[:2]
    expected = np.array([[sacrebleu(hypothesis, reference) for hypothesis in bank] for reference in references])
    assert np.abs(BleuIndex(bank).scores(references) - expected).max() < 1e-4


def test_scores_of_chosen_candidates_are_those_of_the_whole_bank():
    bank = REAL + random_texts(3, 50, 6)
    index = BleuIndex(bank)
    candidates = np.array([[3, 0, 7], [50, 2, 2], [1, 1, 40]])
    whole = index.scores(bank[:3])
    assert np.allclose(index.scores(bank[:3], candidates), np.take_along_axis(whole, candidates, axis=1), atol=1e-9)


def test_the_bank_text_is_the_hypothesis():
    assert BleuIndex(["a b"]).scores(["a b c d"])[0, 0] == pytest.approx(sacrebleu("a b", "a b c d"))
    assert sacrebleu("a b", "a b c d") != pytest.approx(sacrebleu("a b c d", "a b"))


def test_top_is_exact_and_gives_ties_to_the_first():
    bank = [*random_texts(4, 60, 5), "same thing here now", "same thing here now"]
    index = BleuIndex(bank)
    ids, scores = index.top(["same thing here now", bank[0]], 3)
    assert ids[0, :2].tolist() == [60, 61]
    assert np.all(np.diff(scores) <= 1e-9)
    assert scores[1, 0] == pytest.approx(index.scores([bank[0]]).max())


def test_empty_and_oversized_questions_are_answered():
    assert BleuIndex(["a"]).top(["a"], 5)[0].shape == (1, 1)
    assert BleuIndex([""]).scores([""])[0, 0] == sacrebleu("", "") == 0
    assert BleuIndex(["a b"]).scores(["x y"])[0, 0] == 0
