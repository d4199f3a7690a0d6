"""A dataset of a split without rows, such as queries of which there are none, can be read like any other."""

from pi_ray.data.phase_dataset import publish_phase
from pi_ray.train.batches import PhaseDataset


def test_a_split_without_rows_becomes_a_dataset_without_rows(tmp_path):
    (tmp_path / "work").mkdir()
    phase = {"rate": 0.0, "shots": 0}
    made = publish_phase(tmp_path / "work", tmp_path / "done", [1, 2], fingerprint="f", template="", phase=phase)
    assert made["rows"] == 0 and made["tokens"]["row_max"] == made["tokens"]["label_max"] == 0
    data = PhaseDataset(tmp_path / "done")
    assert len(data) == 0 and data.take([]) == [] and data.prefix == [1, 2]
