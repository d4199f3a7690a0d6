"""Ray Train and DeepSpeed with two workers: through the phases, once, and with a teacher whose base model is sharded.

What they survive is in tests/faults.
"""

import pytest

from pi_ray.report.loss_plot import draw_after_phases
from pi_ray.train.launch import is_trained, train
from tests.prepared import prepare_by_hand, tiny_config

pytestmark = pytest.mark.ray
TWO = {"train.workers": 2, "train.backend": {"name": "deepspeed", "zero_stage": 2}, "schedule.epochs": 4}


@pytest.fixture(scope="module")
def quiet(tiny_model, tmp_path_factory, ray_local):
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("quiet"), **TWO)
    prepare_by_hand(config)
    seen = []
    train(config, draw_after_phases(config, seen.append))
    return config, seen


def test_two_deepspeed_workers_train_through_the_phases(quiet):
    config, seen = quiet
    assert is_trained(config)
    steps = [e for e in seen if "loss" in e]
    assert [e["step"] for e in steps] == list(range(36))
    assert sorted({e["phase"] for e in steps}) == [0, 1, 2]
    assert (config.root / "loss.svg").read_text().startswith("<svg ")


def test_a_second_call_trains_nothing(quiet):
    config, _ = quiet
    seen = []
    train(config, seen.append)
    assert seen == []


def test_where_no_worker_has_whole_weights_the_teacher_answers_between_two_groups_of_workers(
    tiny_model, tmp_path, ray_local
):
    config = tiny_config(tiny_model, tmp_path, **{
        "train.workers": 2, "train.backend": {"name": "deepspeed", "zero_stage": 3}, "schedule.shots": 0,
        "train.objective": "distill", "train.distill.top_k": 4,
    })
    prepare_by_hand(config)
    seen = []
    train(config, seen.append)
    assert is_trained(config) and [e["step"] for e in seen if "loss" in e] == list(range(9))
    (answers,) = (e for e in seen if e.get("event") == "teacher_answers")
    assert answers["queries"] == 12 and answers["step"] == 3
    (told,) = (e for e in seen if e.get("event") == "teacher")
    assert (told["step"], told["done"], told["total"]) == (3, 12, 12)
    assert seen.index(told) < seen.index(answers)
