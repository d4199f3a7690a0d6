"""Two worker groups and one run directory: the group that started last writes."""

import json

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from pi_ray.cluster import storage_sync
from pi_ray.cluster.storage_sync import StorageSync
from pi_ray.errors import TrainingError
from pi_ray.run import artifact
from pi_ray.run.artifact import staged
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.train.train_log import TrainLog


@pytest.mark.fault
def test_a_group_on_a_node_of_its_own_sends_nothing_more_once_another_one_has_the_lease(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    bucket = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    monkeypatch.setattr(artifact, "write_listeners", [])

    def group_on(node):
        """A group's log on a node, which shares nothing with others but the bucket, and its storage sync."""
        sync = StorageSync(tmp_path / node, ObjectStorage("s3://bucket/run", bucket, "run"))
        sync.local.mkdir()
        monkeypatch.setattr(storage_sync, "_worker_syncs", {"url": sync})
        artifact.write_listeners[:] = [sync.push]
        return TrainLog(sync.local / "train.jsonl"), sync

    def save(sync, name):
        artifact.write_listeners[:] = [sync.push]
        with staged(sync.local / "checkpoints" / name, fingerprint="f") as tmp:
            (tmp / "state").write_text(name)

    _, lost = group_on("one")
    save(lost, "step-2")
    _, successor = group_on("two")
    with pytest.raises(TrainingError, match=r"s3://bucket/run/train\.owner: another group of workers"):
        save(lost, "step-4")
    save(successor, "step-6")
    assert sorted(lost.storage.list_folders("checkpoints")) == ["step-2", "step-6"]
    with pytest.raises(TrainingError, match="sends nothing more"):
        lost.push_changes()
    assert successor.storage.read("train.owner") == (successor.local / "train.owner").read_bytes()


@pytest.mark.fault
def test_a_group_that_was_given_up_stops_at_its_next_line(tmp_path):
    lost = TrainLog(tmp_path / "train.jsonl")
    lost.add({"step": 0})
    successor = TrainLog(tmp_path / "train.jsonl")
    with pytest.raises(TrainingError, match="another group of workers has taken this run over"):
        lost.add({"step": 1})
    successor.add({"step": 2})
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [0, 2]


def test_other_workers_of_the_group_take_nothing_over(tmp_path):
    first = TrainLog(tmp_path / "train.jsonl")
    holder = (tmp_path / "train.owner").read_text()
    TrainLog(tmp_path / "train.jsonl", writes=False).add({"step": 9})
    assert (tmp_path / "train.owner").read_text() == holder == first.holder
    first.add({"step": 0})
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [0]


def test_storage_that_cannot_be_read_for_a_moment_stops_nobody(tmp_path):
    log = TrainLog(tmp_path / "train.jsonl")
    (tmp_path / "train.owner").rename(tmp_path / "away")
    log.add({"step": 0})
    (tmp_path / "away").rename(tmp_path / "train.owner")
    log.add({"step": 1})
    assert [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [0, 1]
