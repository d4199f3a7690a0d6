"""Datasets of phases as training reads them: without rows, and with turns that are fed and not learned."""

import pyarrow as pa
import pyarrow.parquet as pq

from pi_ray.data.phase_dataset import SCHEMA, publish_phase
from pi_ray.train.batches import PhaseDataset


def test_a_split_without_rows_becomes_a_dataset_without_rows(tmp_path):
    (tmp_path / "work").mkdir()
    phase = {"rate": 0.0, "shots": 0}
    made = publish_phase(tmp_path / "work", tmp_path / "done", [1, 2], fingerprint="f", template="", phase=phase)
    assert made["rows"] == 0 and made["tokens"]["row_max"] == made["tokens"]["label_max"] == 0
    data = PhaseDataset(tmp_path / "done")
    assert len(data) == 0 and data.take([]) == [] and data.prefix == [1, 2]


def test_turns_that_are_fed_between_learned_ones_count_as_prompt(tmp_path):
    (tmp_path / "work").mkdir()
    rows = {"id": ["plain", "talk"], "prompt_ids": [[1, 2, 3], [4]], "label_ids": [[5], [6, 7, ~8, ~9, 10]]}
    pq.write_table(pa.table(rows, schema=SCHEMA), tmp_path / "work" / "part-00000.parquet")
    phase = {"rate": 0.0, "shots": 0}
    made = publish_phase(tmp_path / "work", tmp_path / "done", [1, 2], fingerprint="f", template="", phase=phase)
    assert made["tokens"] == {"prefix": 2, "row_mean": 3, "row_max": 4, "label_mean": 2, "label_max": 2}
    data = PhaseDataset(tmp_path / "done")
    assert data.prompt_lengths.tolist() == [3, 3] and data.label_lengths.tolist() == [1, 3]
    assert data.take([1]) == [([4], [6, 7, ~8, ~9, 10])]
