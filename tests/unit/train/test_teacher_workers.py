"""A teacher that answers outside training: training stops before it, goes on after it, and ends as it would have."""

import json
from itertools import islice

import joblib
import pytest
import torch
from safetensors.torch import load_file

from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir
from pi_ray.train import teacher_workers
from pi_ray.train.launch import fingerprint_of, is_trained
from pi_ray.train.teacher_workers import answer_in_actors, is_due
from pi_ray.train.trainer import train_worker
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_distill import rows_of
from tests.unit.train.test_taught_from_start import prepared
from tests.unit.train.test_train import log_of, settings

WEIGHTS = "adapter_model.safetensors"
CHANGES = {
    "schedule.shots": 0, "schedule.epochs": 2, "train.objective": "distill", "train.distill.top_k": 4,
    "train.distill.label_weight": 0.5, "train.distill.anchor": 0.25,
}


@pytest.fixture
def actors(monkeypatch):
    """Actors of a cluster with one CPU node, in this process; what was asked of them."""
    asked = []

    def stream(items, make, *args, actors, sync, **options):
        worker = make(*json.loads(json.dumps(args)))
        asked.append((len(items), actors, options))
        for place in reversed(range(len(items))):  # they are not done in their order
            yield place, json.loads(json.dumps(worker(items[place])))

    monkeypatch.setattr(teacher_workers, "stream", stream)
    monkeypatch.setattr(teacher_workers, "PART_ROWS", 5)
    monkeypatch.setattr(teacher_workers.session, "connect", lambda: None)
    monkeypatch.setattr(teacher_workers.placement, "cluster_nodes", lambda: [{"CPU": 4.0}])
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    return asked


def made(tiny_model, root, **changes):
    config = tiny_config(tiny_model, root, **{**CHANGES, **changes})
    prepare_by_hand(config)
    return config


def adapter(config, phase):
    return torch.cat([p.flatten() for p in load_file(RunDir(config.root).adapter(phase) / WEIGHTS).values()])


def without_rounding(config):
    return [{**row, **{key: [round(x, 4) for x in row["top_logprobs"]] if key == "top_logprobs" else round(row[key], 4)
                       for key in ("top_logprobs", "confidence")}} for row in rows_of(config)]


def test_training_stops_for_the_actors_and_ends_as_if_its_workers_had_answered(tiny_model, tmp_path, actors):
    inside, outside = made(tiny_model, tmp_path / "in"), made(
        tiny_model, tmp_path / "out", **{"train.distill.actors": True}
    )
    train_worker(settings(inside))
    assert not is_due(outside, fingerprint_of(outside)), "there is no teacher yet"
    train_worker(settings(outside))
    assert [e["step"] for e in log_of(outside) if "loss" in e] == list(range(6)), "the first phase alone"
    assert is_due(outside, fingerprint_of(outside)) and not is_trained(outside)
    entries = []
    answer_in_actors(outside, fingerprint_of(outside), 6, entries.append)
    assert actors == [(7, 1, {"num_cpus": 3})], "12 labels and 12 queries in parts of 5, and the anchor"
    assert [(e["done"], e["total"], e["step"]) for e in entries] == [(2, 12, 6), (7, 12, 6), (12, 12, 6)]
    assert without_rounding(outside) == without_rounding(inside)
    assert not is_due(outside, fingerprint_of(outside))
    train_worker(settings(outside))
    assert is_trained(outside) and torch.equal(adapter(outside, 0), adapter(inside, 0))
    moved = (adapter(inside, 2) - adapter(inside, 0)).norm()
    assert (adapter(outside, 2) - adapter(inside, 2)).norm() < 1e-3 * moved, "other batches round otherwise"
    assert sum(e.get("event") == "teacher_answers" for e in log_of(outside)) == 1


def test_parts_that_were_answered_before_a_kill_are_not_answered_again(tiny_model, tmp_path, actors, monkeypatch):
    whole, killed = (made(tiny_model, tmp_path / name, **{"train.distill.actors": True}) for name in ("a", "b"))
    for config in (whole, killed):
        train_worker(settings(config))
    answer_in_actors(whole, fingerprint_of(whole), 6, lambda entry: None)
    stream, told = teacher_workers.stream, []

    def dies(*args, **options):
        yield from islice(stream(*args, **options), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher_workers, "stream", dies)
        answer_in_actors(killed, fingerprint_of(killed), 6, told.append)
    assert [e["done"] for e in told] == [2, 7], "the anchor came first"
    answer_in_actors(killed, fingerprint_of(killed), 6, told.append)
    assert actors[-1][0] == 4 and [e["done"] for e in told[2:]] == [7, 12]
    assert rows_of(killed) == rows_of(whole) and not RunDir(killed.root).teaching_log.exists()
    manifests = [read_manifest(RunDir(config.root).teacher_answers) for config in (whole, killed)]
    assert manifests[0]["kept"] == manifests[1]["kept"] and manifests[1]["seconds_teaching"] > 0
    answer_in_actors(killed, "another training", 6, told.append)
    assert actors[-1][0] == 7


def test_the_base_answers_before_anything_is_trained(tiny_model, tmp_path, actors):
    config = prepared(tiny_model, tmp_path, **{"train.distill.actors": True})
    assert is_due(config, fingerprint_of(config))
    answer_in_actors(config, fingerprint_of(config), 0, lambda entry: None)
    train_worker(settings(config))
    assert is_trained(config) and any(e.get("event") == "teacher_answers" for e in log_of(config))


def test_another_runs_teacher_answers_first_and_is_kept(tiny_model, tmp_path, actors):
    first = made(tiny_model, tmp_path / "first")
    train_worker(settings(first))
    teacher, student = (str(RunDir(first.root).adapter(i)) for i in (0, 2))
    phases = [{"rate": 1.0, "shots": 0, "steps": 1}, {"rate": 0.0, "shots": 0, "steps": 3}]
    config = first.replace(
        run_dir=str(tmp_path / "again"), schedule={"name": "list", "list": phases},
        **{"train.distill.actors": True, "train.distill.teacher_adapter": teacher, "train.init_adapter": student},
    )
    prepare_by_hand(config)
    assert is_due(config, fingerprint_of(config))
    answer_in_actors(config, fingerprint_of(config), 0, lambda entry: None)
    train_worker(settings(config))
    assert torch.equal(adapter(config, 0), adapter(first, 0)) and is_trained(config)


@pytest.mark.parametrize("distill, refused", [
    ("{on_policy: 0.2}", True), ("{actors: false}", True), ("{}", False), ("{actors: true}", False),
])
def test_zero_stage_3_leaves_answering_to_actors(distill, refused):
    text = f"name: a\ntrain: {{objective: distill, backend: {{zero_stage: 3}}, distill: {distill}}}"
    if refused:
        with pytest.raises(ConfigError, match=r"leave out train.distill.on_policy and train.distill.actors: false"):
            parse_run_file(text, "run.yaml")
        return
    assert parse_run_file(text, "run.yaml").train.actors_answer
    assert not parse_run_file("name: a\ntrain: {objective: distill}", "run.yaml").train.actors_answer
    assert not parse_run_file("name: a\ntrain: {backend: {zero_stage: 3}}", "run.yaml").train.actors_answer
