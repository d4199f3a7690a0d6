"""The base as teacher: what it answers, when views agree, and that nothing is generated twice."""

import json

import pytest
import torch

from pi_ray.answer import base_teacher
from pi_ray.answer.base_teacher import AT_ONCE, BaseTeacher, answer_by_base
from pi_ray.answer.teacher_answer import TeacherAnswer
from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.models import load_model
from pi_ray.protocols import Row
from pi_ray.run import result_log
from pi_ray.run.directory import RunDir
from pi_ray.train.generation import compute_prefix_cache, label_logprobs
from tests.answering import ANSWER, QUERIES, TEMPLATE, write_answering_model
from tests.prepared import tiny_config

ROWS = [Row(f"q{i}", query, "") for i, query in enumerate(QUERIES)]


@pytest.fixture(scope="module")
def answering_model(tiny_model, tmp_path_factory):
    return write_answering_model(tmp_path_factory.mktemp("answering"), tiny_model)


def teacher(model, views=(TEMPLATE,), limit=8):
    return BaseTeacher(ModelConfig(base=str(model), dtype="float32"), PromptConfig(chat="chatml"), views, limit)


def test_a_label_behind_a_cached_prefix_has_the_probability_that_it_has_in_one_piece(tiny_model):
    model = load_model(ModelConfig(base=str(tiny_model), dtype="float32"))
    prefix, rows = [5, 9, 11, 4], [([7, 8, 3], [6, 2]), ([12], [4, 14, 10])]
    found = label_logprobs(model, prefix, rows, compute_prefix_cache(model, prefix))
    for (prompt, label), (logprobs, likeliest) in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prefix, *prompt, *label[:-1]]])).logits[0, -len(label) :]
        expected = torch.log_softmax(logits, -1)[range(len(label)), label]
        assert logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert likeliest.tolist() == (logits.argmax(-1) == torch.tensor(label)).tolist()


def test_the_base_answers_and_every_view_agrees(answering_model):
    answers = teacher(answering_model, (TEMPLATE, TEMPLATE[::-1]))({"rows": [[query, []] for query in QUERIES[:5]]})
    assert [(a["text"], a["ended"], a["agreement"]) for a in answers] == [(ANSWER, True, 1.0)] * 5
    assert all(-5 < a["confidence"] < 0 for a in answers)


def test_an_answer_that_a_view_would_not_give_is_no_agreement(answering_model, monkeypatch):
    seen = iter([True, False])

    def judged(model, prefix, rows, cache):
        gives = next(seen)
        return [(torch.tensor([-0.5, -0.25]), torch.tensor([True, gives])) for _ in rows]

    monkeypatch.setattr(base_teacher, "label_logprobs", judged)
    (answer,) = teacher(answering_model, (TEMPLATE, TEMPLATE[::-1]))({"rows": [["red?", []]]})
    assert answer["agreement"] == 0.5 and answer["confidence"] == pytest.approx(-0.5)


def test_an_answer_over_the_limit_has_not_ended(tiny_model):
    (answer,) = teacher(tiny_model, limit=3)({"rows": [["red?", []]]})
    assert not answer["ended"]


def test_what_was_answered_before_a_kill_is_not_answered_again(tiny_model, tmp_path, monkeypatch):
    asked = []

    def run(config, items, views, limit):
        for place, item in enumerate(items):
            asked.append([query for query, _ in item["rows"]])
            if len(asked) == 2:
                raise KeyboardInterrupt
            judged = {"ended": True, "agreement": 1.0, "confidence": -1.0}
            yield place, [{"text": query, **judged} for query, _ in item["rows"]]

    monkeypatch.setattr(base_teacher, "_run", run)
    config, seen = tiny_config(tiny_model, tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        answer_by_base(config, ROWS, TEMPLATE, 8, lambda done, total: seen.append((done, total)))
    with open(RunDir(tmp_path).answer_log, "a") as log:
        log.write('{"key": "cut off')
    answers, views = answer_by_base(config, ROWS, TEMPLATE, 8, lambda done, total: seen.append((done, total)))
    assert [a.text for a in answers] == QUERIES and views == 2
    assert [query for batch in asked[2:] for query in batch] == QUERIES[AT_ONCE:] and seen[-1] == (len(ROWS), len(ROWS))
    assert answer_by_base(config, ROWS, TEMPLATE, 8, lambda *_: None)[0] == answers and len(asked) == 4
    answer_by_base(config, ROWS, TEMPLATE, 7, lambda *_: None)
    assert len(asked) == 4, "answers that ended are kept when a longer query leaves them less room"
    answer_by_base(config, ROWS[:1], TEMPLATE + "white: w3", 8, lambda *_: None)
    assert len(asked) == 5, "another prompt has other answers"
    lines = RunDir(tmp_path).answer_log.read_text().split("\n")
    assert len([json.loads(line)["key"] for line in lines if line and "cut off" not in line]) == len(ROWS) + 1
    assert answers[0] == TeacherAnswer(QUERIES[0], True, 1.0, -1.0)


def test_answers_go_to_object_storage_while_others_are_written_and_a_cut_off_one_is_written_again_with_more_room(
    tiny_model, tmp_path, monkeypatch
):
    asked, sent = [], []

    def run(config, items, views, limit):
        for place, item in enumerate(items):
            yield place, [{"text": "k", "ended": limit > 8, "agreement": 1.0, "confidence": 0.0} for _ in item["rows"]]
            asked.extend(item["rows"])

    monkeypatch.setattr(base_teacher, "_run", run)
    monkeypatch.setattr(base_teacher, "NOTIFY_EVERY", 1)
    log = RunDir(tmp_path).answer_log
    monkeypatch.setattr(result_log, "notify_written", lambda path: sent.append((path, len(log.read_text().split()))))
    config = tiny_config(tiny_model, tmp_path)
    answer_by_base(config, ROWS, TEMPLATE, 8, lambda *_: None)
    assert {path for path, _ in sent} == {log} and sent[0][1] < sent[-1][1], "not only when all is done"
    answers, _ = answer_by_base(config, ROWS, TEMPLATE, 9, lambda *_: None)
    assert len(asked) == 2 * len(ROWS) and all(answer.ended for answer in answers)
    answer_by_base(config, ROWS, TEMPLATE, 8, lambda *_: None)
    assert len(asked) == 2 * len(ROWS)
