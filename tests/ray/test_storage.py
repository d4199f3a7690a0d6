"""A run directory on object storage, for actors that are not pi-ray's: each node fetches it before they start."""

import shutil

import pytest

from pi_ray.cluster.storage_sync import StorageSync
from pi_ray.data.ray_map import fetch_on_nodes
from pi_ray.errors import CorruptArtifactError
from pi_ray.run.artifact import staged
from pi_ray.run.object_storage import ObjectStorage

pytestmark = pytest.mark.ray


@pytest.fixture
def sent(tmp_path, ray_local):
    """The sync of a run directory whose adapter is in a bucket, and not here any more."""
    (tmp_path / "bucket").mkdir()
    sync = StorageSync(tmp_path / "run", ObjectStorage((tmp_path / "bucket").as_uri()))
    with staged(sync.local / "adapters" / "phase-0") as made:
        (made / "weights").write_text("rank 32")
    sync.push_changes()
    shutil.rmtree(sync.local)
    return sync


def test_every_node_has_what_was_sent_before_other_actors_start(sent):
    fetch_on_nodes(sent)
    assert (sent.local / "adapters" / "phase-0" / "weights").read_text() == "rank 32"


def test_a_node_that_finds_damage_says_so_in_our_own_words(sent, tmp_path):
    next((tmp_path / "bucket").rglob("weights")).write_text("rank 64")
    with pytest.raises(CorruptArtifactError, match=r"phase-0 is damaged .*; remove it there"):
        fetch_on_nodes(sent)
