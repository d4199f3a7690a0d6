"""A score file says what it likes, here as it is, and in a job behind the sandbox's walls."""

import pytest

from pi_ray.config import TaskConfig
from pi_ray.errors import ConfigError, DataError
from pi_ray.metrics import RowScorer
from pi_ray.protocols import Row

LENGTH = "def score(row, output):\n    return {'length': min(1, len(output) / len(row['answer'])), 'same': True}\n"
ROWS = [Row(f"r{i}", f"q{i}", "abcd", documents=("d",)) for i in range(3)]


@pytest.fixture
def scorer(tmp_path):
    def make(source, sandbox=False, **task):
        path = tmp_path / "score.py"
        path.write_text(source, encoding="utf-8")
        return RowScorer(TaskConfig(metric={"name": "python", "file": str(path), "sandbox": sandbox}, **task))

    return make


def test_the_files_numbers_are_the_scores_and_it_runs_once(scorer, tmp_path):
    log = tmp_path / "runs"
    made = scorer(f"open({str(log)!r}, 'a').write('x')\n{LENGTH}")
    assert made.score_all(ROWS, ["ab", "", "\ud800\u732b" * 9]) == [
        {"length": 0.5, "same": 1.0}, {"length": 0.0, "same": 1.0}, {"length": 1.0, "same": 1.0},
    ]
    assert log.read_text() == "x"


def test_the_row_is_a_dict_with_all_that_a_row_has(scorer):
    made = scorer("def score(row, output):\n    return {' '.join(sorted(row)).replace(' ', '_'): 1}\n")
    assert made.score(ROWS[0], "") == {"answer_documents_group_id_query": 1.0}


@pytest.mark.parametrize("returned, says", [
    ("{'x': float('nan')}", "x of row 'r0' is nan"), ("{'x': 1.5}", "from 0 to 1"), ("{'x': -1e-3}", "from 0 to 1"),
    ("{'x': 10 ** 400}", "from 0 to 1"), ("{'x': '1'}", "from 0 to 1"), ("{}", "returns names with numbers"),
    ("0.5", "returns names with numbers"), ("{'bleu': 1}", "none of the names"), ("{'a b': 1}", "returns names"),
    ("{'x': 1} if row['id'] == 'r0' else {'y': 1}", "the same for each"),
])  # fmt: skip
def test_what_is_no_score_is_refused_with_its_row(scorer, returned, says):
    with pytest.raises(DataError, match=says):
        scorer(f"def score(row, output):\n    return {returned}\n").score_all(ROWS, [""] * 3)


def test_an_error_in_the_file_names_file_and_row_before_anything_is_trained(scorer):
    with pytest.raises(DataError, match=r"score\.py: score\(\) raised KeyError on row 'r1': 'none'"):
        scorer("def score(row, output):\n    return row['none']\n").check(ROWS[1])


@pytest.mark.parametrize("source, says", [
    ("def score(row", "not Python"), ("\0", "not Python"), ("x = 1", "no function score"), ("1 / 0", "ZeroDivision"),
    ("exit(1)", "SystemExit"),
])  # fmt: skip
def test_a_file_that_cannot_score_is_refused(scorer, source, says):
    with pytest.raises(ConfigError, match=says):
        scorer(source).check(ROWS[0])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        RowScorer(TaskConfig(metric={"name": "python", "file": str(tmp_path / "none.py")}))


def test_checking_scores_the_first_row_alone(scorer, tmp_path):
    log = tmp_path / "calls"
    made = scorer(f"def score(row, output):\n    open({str(log)!r}, 'a').write('x')\n    return {{'x': 1}}\n")
    assert [made.check(row) for row in ROWS] == [""] * 3 and log.read_text() == "x"
