"""A run directory on object storage, for actors that are not pi-ray's: each node fetches it before they start."""

import shutil
from pathlib import Path

import pytest

from pi_ray.cluster.storage_sync import StorageSync
from pi_ray.data.ray_map import fetch_on_nodes
from pi_ray.errors import CorruptArtifactError
from pi_ray.run.artifact import staged
from pi_ray.run.object_storage import ObjectStorage

pytestmark = pytest.mark.ray


def write_artifact(folder: Path, text: str) -> None:
    with staged(folder) as made:
        (made / "weights").write_text(text)


def test_every_node_has_what_was_sent_before_other_actors_start(tmp_path, ray_local):
    root, bucket = tmp_path / "run", tmp_path / "bucket"
    bucket.mkdir()
    sync = StorageSync(root, ObjectStorage(bucket.as_uri()))
    write_artifact(root / "adapters" / "phase-0", "rank 32")
    sync.push_changes()
    shutil.rmtree(root)
    fetch_on_nodes(sync)
    assert (root / "adapters" / "phase-0" / "weights").read_text() == "rank 32"


def test_a_node_that_finds_damage_says_so_in_our_own_words(tmp_path, ray_local):
    root, bucket = tmp_path / "run", tmp_path / "bucket"
    bucket.mkdir()
    sync = StorageSync(root, ObjectStorage(bucket.as_uri()))
    write_artifact(root / "adapters" / "phase-0", "rank 32")
    sync.push_changes()
    shutil.rmtree(root)
    next(bucket.rglob("weights")).write_text("rank 64")
    with pytest.raises(CorruptArtifactError, match=r"phase-0 is damaged .*; remove it there"):
        fetch_on_nodes(sync)
