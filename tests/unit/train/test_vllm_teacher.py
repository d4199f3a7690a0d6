"""A teacher that answers by vLLM (a stand-in of it) writes what one in training workers would."""

import pytest

from pi_ray.train import teacher_workers, vllm_reader
from pi_ray.train.launch import fingerprint_of, is_trained
from pi_ray.train.teacher_workers import answer_in_actors
from pi_ray.train.trainer import train_worker
from tests.fake_vllm import FakeVllm
from tests.unit.train.test_anchor import use_pairs
from tests.unit.train.test_distill import rows_of
from tests.unit.train.test_teacher_workers import made
from tests.unit.train.test_train import settings


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """With few rows in the anchor, since the stand-in computes every place of an answer by itself."""
    use_pairs(tmp_path, monkeypatch)
    fake = FakeVllm()
    monkeypatch.setattr(vllm_reader, "answer_prompts", fake)
    monkeypatch.setattr(teacher_workers, "choose_engine", lambda config, adapters: "vllm")
    monkeypatch.setattr(teacher_workers, "PART_ROWS", 5)
    monkeypatch.setattr(teacher_workers.session, "connect", lambda: None)
    monkeypatch.setattr(teacher_workers.placement, "cluster_nodes", lambda: [{"CPU": 4.0, "GPU": 1.0}])
    return fake


@pytest.mark.parametrize("label_weight", [0.5, 1.0], ids=["labels are judged", "labels stand"])
def test_its_rows_are_those_of_the_training_workers(tiny_model, tmp_path, vllm, label_weight):
    changes = {"train.distill.label_weight": label_weight}
    inside = made(tiny_model, tmp_path / "in", **changes)
    outside = made(tiny_model, tmp_path / "out", **{**changes, "train.distill.actors": True})
    for config in (inside, outside):
        train_worker(settings(config))
    entries = []
    answer_in_actors(outside, fingerprint_of(outside), 6, entries.append)
    assert len(vllm.asked) == 2, "it starts to write, and to judge"
    assert [e["done"] for e in entries] == [5, 10, 12]
    mine, theirs = rows_of(outside), rows_of(inside)
    assert len(mine) == len(theirs) > 12
    for a, b in zip(mine, theirs, strict=True):
        same = ("labelled", "number", "label_ids", "agreement", "held_out")
        assert {k: a[k] for k in same} == {k: b[k] for k in same}
        # views note 64 tokens of 49,152 each, and this random model's distributions are nearly flat
        assert a["confidence"] == pytest.approx(b["confidence"], abs=0.3)
        if a["labelled"] and label_weight == 1:
            assert a["top_ids"] == b["top_ids"]
    train_worker(settings(outside))
    assert is_trained(outside)


def test_it_asks_with_the_adapter_and_the_anchor_without(tiny_model, tmp_path, vllm):
    config = made(tiny_model, tmp_path, **{"train.distill.actors": True})
    train_worker(settings(config))
    answer_in_actors(config, fingerprint_of(config), 6, lambda entry: None)
    written, judged = vllm.asked
    assert len(written) == 12 and {p.adapter for p in written} == {str(teacher_workers.teacher_folder(config))}
    assert {p.adapter for p in judged} == {str(teacher_workers.teacher_folder(config)), ""}
    assert all(p.sampling["max_tokens"] == 1 and p.sampling["logprobs"] == 64 for p in judged)
