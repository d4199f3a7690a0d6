"""The vectorised BLEU says what sacrebleu says."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from pi_ray.retrieve.bleu import BleuIndex
from pi_ray.retrieve.ngrams import words_13a

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
ODD = [
    "1.5,2 a.b,c ..x ,,y 3.-4 5-6 -7 8- .9. a<skipped>b",
    "x &amp;quot; &amp;lt; & y&z",
    "tail \t\n ",
    "end-\n-\nof",
    "{a}~[b]`c` @:;<=>? !\"#$%&'()*+,-./^_|\\",
    "the " * 70,
    "w " * 200 + "the end",
    "",
    " ",
    "a",
    "a b",
    "a b c",
    "ünïcödé – ça va? 日本語 テスト",
    "&quot;quoted&quot; &lt;tag&gt;",
    "line one\nline two-\nwrapped",
    "1,000.50-3",
    "\u00a0x\u2003y",
]


def sacrebleu(hypothesis: str, reference: str) -> float:
    return SENTENCE.sentence_score(hypothesis, [reference]).score


def random_texts(seed: int, count: int, vocabulary: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(vocabulary)}" for _ in range(rng.randrange(0, 20))) for _ in range(count)]


@pytest.mark.parametrize(
    "bank", [REAL + ODD, random_texts(1, 40, 3), random_texts(2, 40, 50)], ids=["real and odd", "repetitive", "sparse"]
)
def test_every_pair_equals_sacrebleu(bank):
    references = bank[::2] + REAL[:2]
    expected = np.array([[sacrebleu(hypothesis, reference) for hypothesis in bank] for reference in references])
    assert np.abs(BleuIndex(bank).scores(references) - expected).max() < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_words_are_those_of_sacrebleu(seed):
    rng = random.Random(seed)
    marks = [chr(c) for c in range(32, 127)] + [
        "\n", "\t", "é", "\u2028", "&quot;", "&amp;", "<skipped>", "-\n", "12", "3.4", "a,b",
    ]
    for text in [*ODD, *REAL, *("".join(rng.choices(marks, k=rng.randrange(60))) for _ in range(2000))]:
        assert words_13a(text) == SENTENCE._preprocess_segment(text).split(), repr(text)


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


def test_top_equals_the_sorted_scores_of_all_pairs_whatever_the_threads():
    bank = [*random_texts(5, 300, 8), *REAL, *ODD]
    index = BleuIndex(bank)
    scores = index.scores(bank)
    order = np.argsort(-np.round(scores, 9), axis=1, kind="stable")[:, :7]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda begin: index.top(bank[begin : begin + 50], 7), range(0, len(bank), 50)))
    ids, best = index.top(bank, 7)
    assert (np.concatenate([some for some, _ in parts]) == ids).all()
    assert (np.concatenate([some for _, some in parts]) == best).all()
    assert np.allclose(best, np.take_along_axis(scores, order, axis=1), atol=1e-9)
    assert np.all(np.take_along_axis(scores, ids, axis=1) == best)


def test_a_group_is_never_compared_with_itself():
    groups = np.arange(40) % 4
    index = BleuIndex(random_texts(6, 40, 5), groups)
    ids, best = index.top(random_texts(7, 4, 5), 40, groups[:4])
    for own, row, scores in zip(groups, ids, best, strict=False):
        assert (
            set(groups[row[:30]]) == {0, 1, 2, 3} - {own}
            and row[30:].tolist() == [-1] * 10
            and (scores[:30] >= 0).all()
        )


def test_empty_and_oversized_questions_are_answered():
    assert BleuIndex(["a"]).top(["a"], 5)[0].shape == (1, 1)
    assert BleuIndex([""]).scores([""])[0, 0] == sacrebleu("", "") == 0
    assert BleuIndex(["a b"]).scores(["x y"])[0, 0] == 0
