"""The storm counts what may not happen, and does not pass when nothing happened at all."""

from tests.bench.chaos import Tally
from tests.faults.service import Answer

ASKED, ANSWERS = ("a", "x"), {("a", "x"): "right", ("b", "x"): "other"}


def tally(*answers, killed=1):
    made = Tally()
    made.killed = killed
    for answer in answers:
        made.note(answer, ASKED, ANSWERS)
    return made


def test_a_storm_passes_with_right_answers_and_told_failures_after_a_replica_was_killed():
    right, told = Answer("right"), Answer("ri", error="503 come back later")
    assert not tally(right, told).failed()
    assert tally(right, told, killed=0).failed()
    for wrong in (
        Answer("other"), Answer("ri"), Answer("other", error="503 later"), Answer("ri", error="ended", lost=True),
        Answer(error="404 no adapter"),
    ):
        assert tally(right, wrong).failed()
    assert tally().failed()
