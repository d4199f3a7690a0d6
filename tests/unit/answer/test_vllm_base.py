"""The base as teacher by vLLM (a stand-in of it) answers, agrees and doubts as the base in an actor does."""

import pytest

from pi_ray.answer import base_teacher, vllm_base
from pi_ray.answer.base_teacher import AT_ONCE, BaseTeacher
from pi_ray.answer.vllm_base import answer_items
from pi_ray.config import ModelConfig
from pi_ray.train import vllm_reader
from tests.answering import ANSWER, QUERIES, TEMPLATE, write_answering_model
from tests.fake_vllm import FakeVllm
from tests.prepared import tiny_config

VIEWS = [TEMPLATE, TEMPLATE.replace("red: k4\nblue: z9", "blue: z9\nred: k4")]


@pytest.fixture
def vllm(monkeypatch):
    fake = FakeVllm()
    monkeypatch.setattr(vllm_reader, "answer_prompts", fake)
    return fake


def items_of(queries):
    rows = [[query, []] for query in queries]
    return [{"rows": rows[i : i + 3]} for i in range(0, len(rows), 3)]


def test_answers_are_those_of_an_actor(tiny_model, tmp_path, vllm, monkeypatch):
    model = write_answering_model(tmp_path / "answering", tiny_model)
    config = tiny_config(model, tmp_path, **{"prompt.chat": "chatml", "model.dtype": "float32"})
    monkeypatch.setattr(vllm_base, "ITEMS", 2)
    items = items_of(QUERIES[:8])
    mine = dict(answer_items(config, items, VIEWS, 8, []))
    actor = BaseTeacher(ModelConfig(base=str(model), dtype="float32"), config.prompt, VIEWS, 8)
    label = actor.encoder.answer(ANSWER)
    assert [len(asked) for asked in vllm.asked[:2]] == [6, 6 * len(label)], "it writes, and judges in the other view"
    assert len(vllm.asked) == 4, "twice for every two items"
    for place, item in enumerate(items):
        for a, b in zip(mine[place], actor(item), strict=True):
            assert (a["text"], a["ended"], a["agreement"]) == (b["text"], b["ended"], b["agreement"])
            assert (a["text"], a["agreement"]) == (ANSWER, 1.0)
            assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-3)


def test_an_answer_over_the_limit_is_not_judged(tiny_model, tmp_path, vllm):
    config = tiny_config(tiny_model, tmp_path, **{"model.dtype": "float32"})
    ((_, (answer,)),) = answer_items(config, items_of(QUERIES[:1]), VIEWS, 3, [])
    actor = BaseTeacher(config.model, config.prompt, VIEWS, 3)
    assert not answer["ended"] and answer["text"] == actor(items_of(QUERIES[:1])[0])[0]["text"]
    assert len(vllm.asked) == 1


def test_vllm_is_taken_where_it_is_chosen(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(base_teacher.session, "connect", lambda: None)
    monkeypatch.setattr(base_teacher.placement, "cluster_nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr(base_teacher, "choose_engine", lambda config, adapters: "vllm" if not adapters else "")
    monkeypatch.setattr(base_teacher, "answer_items", lambda config, items, *rest: iter([(0, ["by vllm"])]))
    config = tiny_config(tiny_model, tmp_path)
    assert list(base_teacher._run(config, items_of(QUERIES[:AT_ONCE]), VIEWS, 8)) == [(0, ["by vllm"])]
