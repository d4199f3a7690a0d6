"""Progress without a terminal: a line every ten seconds, with the time left at the present speed."""

import io

import pytest
from rich.console import Console

from pi_ray import progress
from pi_ray.progress import ProgressLine, training_listener


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_line_every_ten_seconds_and_at_the_end(clock):
    console = Console(file=io.StringIO(), width=100)
    with ProgressLine(console, "work", 100) as shown:
        for i in range(1, 101):
            clock[0] += 1
            shown.update(i)
    assert len(lines(console)) == 11
    assert lines(console)[0] == "work: 1/100  "
    assert lines(console)[1].endswith("89 s left")
    assert lines(console)[-1].startswith("work: 100/100")


def test_time_left_follows_the_present_speed(clock):
    console = Console(file=io.StringIO(), width=100)
    with ProgressLine(console, "work", 120) as shown:
        for i in range(1, 101):
            clock[0] += 12 if i <= 50 else 2
            shown.update(i)
    assert lines(console)[-1].endswith("40 s left")


def test_training_shows_phase_update_loss_and_speed(clock):
    console = Console(file=io.StringIO(), width=120)
    with ProgressLine(console, "update", 20) as shown:
        listen = training_listener(shown, [10] * 5 + [2] * 15)
        listen({"step": 4, "phase": 1, "loss": 0.5, "tokens": 300, "plain_tokens": 1200, "seconds": 2.0})
        listen({"event": "phase_end", "phase": 1, "step": 4, "dev_loss": 0.25})
        listen({"event": "plain_batches", "reason": "attention is limited to a sliding window of 64 tokens"})
        clock[0] += 60
        listen({"event": "teacher", "step": 5, "verb": "judged", "done": 64, "total": 720})
    text = console.file.getvalue()
    assert "5/20" in text and "phase 1" in text and "loss 0.500" in text
    assert "150 tokens/s, 75% saved by sharing" in text
    assert "6 s left" in text  # 15 updates of a fifth of the work of the one that took 2 s
    assert "phase 1 done, dev loss 0.250" in text and "sliding window" in text
    assert "the teacher has judged 64 of 720 rows" in text


def test_while_the_teacher_answers_the_time_left_is_its_own_and_that_of_later_updates(clock):
    console = Console(file=io.StringIO(), width=120)
    with ProgressLine(console, "update", 20) as shown:
        listen = training_listener(shown, [1] * 20)
        listen({"step": 9, "phase": 0, "loss": 0.5, "tokens": 300, "plain_tokens": 1200, "seconds": 3.0})
        for verb, done in (("answered", 64), ("answered", 128), ("answered", 192), ("judged", 64), ("judged", 128)):
            clock[0] += 20
            listen({"event": "teacher", "step": 10, "verb": verb, "done": done, "total": 256})
    left = [line.split("  ")[-1] for line in lines(console)[1:]]
    assert left == ["30 s left", "70 s left", "50 s left", "30 s left", "70 s left"], "30 s are the updates'"


@pytest.mark.parametrize("entry, text", [
    (
        {"event": "dev", "phase": 0, "step": 9, "dev_loss": 0.5, "dev_accuracy": 0.25},
        "update 10, dev loss 0.500, dev accuracy 25.0%",
    ),
    (
        {"event": "phase_end", "phase": 0, "step": 9, "dev_loss": 0.5, "best_step": 5, "early": True},
        "phase 0 done early, no more gain, dev loss 0.500; adapter written, as it was after update 6",
    ),
    (
        {"event": "phase_end", "phase": 0, "step": 9, "dev_loss": 0.5, "best_step": 9, "early": False},
        "phase 0 done, dev loss 0.500; adapter written",
    ),
    (
        {"event": "best", "phase": 2, "step": 9, "dev_accuracy": 0.75},
        "the best adapter on dev rows is that of phase 2 (75.0% of their tokens right)",
    ),
    (
        {"event": "phase_end", "phase": 1, "step": 9, "dev_loss": 0.5, "scores": {"exact_match": 0.75}},
        "phase 1 done, dev loss 0.500; adapter written; its answers to dev rows: exact match 75.0%",
    ),
    ({"event": "best", "phase": 1, "floor": {"sentence": "Keep the whole prompt."}}, "Keep the whole prompt."),
    (
        {"event": "teacher_answers", "queries": 9, "answered": 8, "kept": 7, "views": 1, "options": ["labels count"]},
        "the teacher answered 8 of 9 unlabelled queries, 7 of them surely enough to learn from; labels count",
    ),
    (
        {"event": "student_answers", "round": 0, "answers": 9, "tokens": 80, "replaced": 4, "divergence": 0.0123},
        "the student answered 9 queries, the teacher replaced 4 of their 80 tokens; both were 0.012 bits apart at each "
        "token",
    ),
    ({"event": "warning", "text": "checkpoint set aside"}, "warning: checkpoint set aside"),
    ({"event": "of a later version"}, ""),
])  # fmt: skip
def test_events_are_shown_in_words(entry, text):
    console = Console(file=io.StringIO(), width=200)
    with ProgressLine(console, "update", 20) as shown:
        training_listener(shown, [1] * 20)(entry)
    assert lines(console) == ([f"update: {text}"] if text else [])


def test_no_saving_is_shown_where_no_prefix_is_shared():
    console = Console(file=io.StringIO(), width=200)
    with ProgressLine(console, "update", 20) as shown:
        listen = training_listener(shown, [1] * 20)
        listen({"step": 4, "phase": 1, "loss": 0.5, "tokens": 300, "plain_tokens": 300, "seconds": 2.0})
    assert "saved" not in lines(console)[0]
