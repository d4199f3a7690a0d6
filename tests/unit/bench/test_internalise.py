"""The figures of the benchmark of internalisation, from a run's summary and log."""

from tests.bench.internalise import figures_of


def test_figures_are_those_of_the_summary_and_the_log():
    groups = {"like train": {"rows": 4, "exact_match": 1.0}, "template only": {"rows": 4, "exact_match": 0.5}}
    summary = {"plain": {"exact_match": 0.5, "groups": {}}, "promptintern": {"exact_match": 0.75, "groups": groups}}
    answers = {"event": "teacher_answers", "queries": 9, "answered": 8, "kept": 7, "seconds_teaching": 3.0}
    log = [{"step": 0, "loss": 1.0, "seconds": 2.0}, answers, {"step": 1, "loss": 0.5, "seconds": 1.5}]
    assert figures_of(summary, log) == {
        "plain_exact_match": 0.5, "promptintern_exact_match": 0.75, "promptintern_like_train": 1.0,
        "promptintern_template_only": 0.5, "queries": 9, "kept": 7, "seconds_teaching": 3.0, "train_seconds": 3.5,
    }


def test_a_run_without_a_teacher_has_no_answers_to_count():
    summary = {"plain": {"exact_match": 0.5}, "promptintern": {"exact_match": 0.5}}
    assert "kept" not in figures_of(summary, [{"loss": 1.0, "seconds": 2.0}])
