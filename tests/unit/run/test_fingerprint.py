"""What a run has learned from is known by its content, not by where it lay."""

import pytest

from pi_ray.config import RunConfig
from pi_ray.run.artifact import seal_folder
from pi_ray.run.fingerprint import learning_settings, train_fingerprint


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
