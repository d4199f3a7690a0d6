"""Several metrics at once: in their order, the first decides, and a judge is never asked here."""

import pytest

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.metrics import RowScorer
from pi_ray.protocols import Row
from pi_ray.registry import metrics

ROW = Row("1", "q", "a 5")


def test_numbers_come_in_the_order_of_the_run_file_under_their_labels():
    scorer = RowScorer(TaskConfig(metric=["number", {"name": "f1", "label": "words"}, "exact_match"]))
    found = scorer.score(ROW, "b 5")
    assert [*found] == ["number", "words", "exact_match"]
    assert [*found.values()] == pytest.approx([1, 2 / 3, 0])
    assert scorer.score_all([], []) == []


def test_without_a_metric_and_with_a_judge_alone_it_is_exact_match():
    for metric in ((), {"name": "judge", "rubric": "good"}):
        assert RowScorer(TaskConfig(metric=metric)).score(ROW, "a  5") == {"exact_match": 1.0}
    judged = RowScorer(TaskConfig(metric=[{"name": "judge", "rubric": "good"}, "f1"]))
    assert [*judged.score(ROW, "")] == ["f1"]


def test_the_first_reason_against_a_row_is_given():
    scorer = RowScorer(TaskConfig(metric=["f1", "number", "json"]))
    assert "no number" in scorer.check(Row("1", "q", "none")) and "no JSON" in scorer.check(ROW)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.1, -0.1, None, "1", 10**400])
def test_a_metric_of_a_package_must_give_a_number_from_0_to_1(monkeypatch, value):
    class Broken:
        def __init__(self, config, task):
            pass

        def score(self, row, output):
            return value

    monkeypatch.setitem(metrics._parts, "broken", f"{__name__}:Broken")
    monkeypatch.setattr(f"{__name__}.Broken", Broken, raising=False)
    with pytest.raises(DataError, match="broken of row '1' is"):
        RowScorer(TaskConfig(metric="broken")).score(ROW, "")


def test_two_numbers_of_one_name_are_refused(tmp_path):
    (tmp_path / "score.py").write_text("def score(row, output):\n    return {'f1': 1}\n")
    with pytest.raises(DataError, match="two metrics give a number 'f1'"):
        RowScorer(TaskConfig(metric=["f1", {"name": "python", "file": str(tmp_path / "score.py")}])).score(ROW, "")
