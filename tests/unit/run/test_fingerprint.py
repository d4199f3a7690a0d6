"""What a run has learned from is known by its content, not by where it lay."""

import pytest

from pi_ray.config import RunConfig
from pi_ray.run.artifact import seal_folder
from pi_ray.run.fingerprint import evaluate_fingerprint, learning_settings, prepare_fingerprint, train_fingerprint


def adapter(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(content)
    seal_folder(folder)
    return str(folder)


@pytest.mark.parametrize("key", ["init_adapter", "distill.teacher_adapter"])
def test_an_adapter_that_was_replaced_in_place_is_another_and_a_moved_one_is_not(tmp_path, key):
    def facts(folder):
        train = {"objective": "distill"} | ({"init_adapter": folder} if key == "init_adapter" else {})
        train |= {"distill": {"teacher_adapter": folder}} if key != "init_adapter" else {}
        config = RunConfig(name="t", train=train)
        return train_fingerprint(config, "prepared"), learning_settings(config)[f"train.{key}"]

    first = facts(adapter(tmp_path / "a", b"one"))
    assert facts(adapter(tmp_path / "b", b"one")) == first
    replaced = facts(adapter(tmp_path / "a", b"two"))
    assert replaced[0] != first[0] and replaced[1] != first[1]
    assert facts(str(tmp_path / "none"))[1] == str(tmp_path / "none")


RUNS_CODE = {"task.name": "mbpp", "task.allow_code_execution": True}


def test_what_changes_no_row_leaves_prepared_rows_and_adapters_as_they_are():
    config = RunConfig(name="t")
    same = {
        "task.allow_code_execution": True, "task.unsafe_local_execution": True, "task.max_bad_rows": 3,
        "compress.api_key_env": "OTHER", "evaluate.shots": 2,
    }
    changed = config.replace(**same)
    assert prepare_fingerprint(changed, "t") == prepare_fingerprint(config, "t")
    assert learning_settings(changed) == learning_settings(config)
    more = config.replace(**{"schedule.shots": config.schedule.shots + 1})
    assert prepare_fingerprint(more, "t") != prepare_fingerprint(config, "t")


def test_programs_that_are_run_give_other_scores_and_other_dev_answers_where_a_floor_reads_these():
    config = RunConfig(name="t").replace(**{"task.name": "mbpp"})
    runs_code = config.replace(**RUNS_CODE)
    assert evaluate_fingerprint(runs_code, []) != evaluate_fingerprint(config, [])
    assert train_fingerprint(runs_code, "p") == train_fingerprint(config, "p")
    floor = {"schedule.floor": 0.9}
    assert train_fingerprint(runs_code.replace(**floor), "p") != train_fingerprint(config.replace(**floor), "p")
