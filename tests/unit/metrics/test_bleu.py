"""BLEU of one output is sacrebleu's sentence BLEU as a share."""

import pytest
from sacrebleu.metrics.bleu import BLEU

from tests.unit.metrics.scores import score


@pytest.mark.parametrize("output", ["the cat sat on a mat", "cat", "the the the the", "Katze \u732b"])
def test_it_is_sacrebleus_sentence_bleu(output):
    expected = BLEU(effective_order=True).sentence_score(output, ["the cat sat on the mat"]).score / 100
    assert score("bleu", "the cat sat on the mat", output) == [round(expected, 3)]


def test_nothing_scores_nothing_and_the_answer_all():
    assert score("bleu", "a b c d", "", " ", "a b c d") == [0, 0, 1]
