"""Another run's teacher, in place of a first phase: it answers, is kept, and the student goes on as it was."""

import pytest
import torch

from pi_ray.config import RunConfig
from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError, TrainingError
from pi_ray.plan.estimate import tokens_of_updates
from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.phases import plain_finetuning_config
from pi_ray.schedule import plan_phases
from pi_ray.train.launch import is_trained
from pi_ray.train.lora import load_init_adapter
from pi_ray.train.teacher_adapter import adopt_teacher
from pi_ray.train.trainer import Trainer, train_worker
from pi_ray.train.updates import plan_updates
from tests import workers
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_distill import rows_of
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings


@pytest.fixture(scope="module")
def first(tiny_model, tmp_path_factory):
    changes = {"train.objective": "distill", "train.distill.top_k": 4, "schedule.shots": 0, "schedule.epochs": 2}
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("first"), **changes)
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def again(first, root, **changes):
    """A refresh of `first`: its teacher, its student, 5 updates with the query alone."""
    run = RunDir(first.root)
    phases = [{"rate": 1.0, "shots": 0, "steps": 1}, {"rate": 0.0, "shots": 0, "steps": 5}]
    config = first.replace(run_dir=str(root), schedule={"name": "list", "list": phases}, **{
        "train.distill.teacher_adapter": str(run.adapter(0)), "train.init_adapter": str(run.adapter(2)), **changes,
    })
    prepare_by_hand(config)
    return config


@pytest.fixture(scope="module")
def refreshed(first, tmp_path_factory):
    config = again(first, tmp_path_factory.mktemp("again"))
    train_worker(settings(config))
    return config


def weights(config, phase):
    return verify_artifact(RunDir(config.root).adapter(phase))["files"]["adapter_model.safetensors"]


def test_the_first_phase_has_no_updates_and_its_adapter_is_the_teacher(first, refreshed):
    assert [(e["step"], e["phase"]) for e in log_of(refreshed) if "loss" in e] == [(step, 1) for step in range(5)]
    assert weights(refreshed, 0) == weights(first, 0) and is_trained(refreshed)
    assert not any(e.get("event") == "drills" for e in log_of(refreshed))


def test_the_teacher_answers_and_not_the_student(first, refreshed):
    labels = [[row["confidence"] for row in rows_of(config) if row["labelled"]] for config in (first, refreshed)]
    assert labels[1] == pytest.approx(labels[0], abs=1e-3), "the same teacher, prompt and labels"


def test_training_goes_on_from_the_student(first, tmp_path):
    config = again(first, tmp_path)
    worker = Trainer(RunConfig.model_validate(settings(config)["config"]), "f", "cpu", None)
    assert worker.resume() == 0
    adopt_teacher(worker)
    saved = load_init_adapter(RunDir(first.root).adapter(2), worker.model, first.model.base)
    state = worker.backend.state()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert not any(value.any() for name, value in state.items() if "/" in name)
    worker.close()


def test_a_refresh_that_dies_goes_on_to_the_same_adapter(first, refreshed, tmp_path, monkeypatch):
    config = again(first, tmp_path)
    dies_and_goes_on(config, 3, monkeypatch)
    assert adapter_hash(config, 1) == adapter_hash(refreshed, 1)


def test_a_fresh_student_learns_the_same_with_deepspeed(first, tmp_path):
    """Its optimiser has no state yet when the student's weights are put aside."""
    plain, zero = (
        again(first, tmp_path / name, **{"train.init_adapter": "", "train.backend": {"name": name}})
        for name in ("ddp", "deepspeed")
    )
    train_worker(settings(plain))
    workers.run(1, train_worker, settings(zero))
    losses = [[e["loss"] for e in log_of(config) if "loss" in e] for config in (plain, zero)]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert weights(zero, 0) == weights(first, 0)


def test_plain_fine_tuning_beside_it_has_all_updates_and_a_progress_line_for_each(first, tmp_path):
    config = again(first, tmp_path)
    assert len(tokens_of_updates(config)) == 5
    plain = plain_finetuning_config(config)
    prepare_by_hand(plain)
    assert len(tokens_of_updates(plain)) == len(plan_updates([12, 12], plan_phases(plain.schedule), plain.train)) == 6


def test_a_teacher_of_another_shape_is_refused_by_its_key(first, tmp_path):
    config = again(first, tmp_path, **{"train.lora.rank": 8, "train.init_adapter": ""})
    with pytest.raises(TrainingError, match=r"train\.distill\.teacher_adapter: .* does not fit"):
        train_worker(settings(config))


def test_two_teachers_are_one_too_many():
    with pytest.raises(ConfigError, match="a teacher of its own"):
        parse_run_file("name: a\ntrain: {distill: {teacher: base, teacher_adapter: /a}}", "run.yaml")
