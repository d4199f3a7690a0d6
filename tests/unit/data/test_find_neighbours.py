"""What preparation says of the examples that it found."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi_ray.config import RunConfig
from pi_ray.data.find_neighbours import SCHEMA, has_neighbours, same_answer_share, summarise_facts
from pi_ray.protocols import Row
from pi_ray.run.artifact import digest_file
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import write_rows

FACTS = {"shots": 2, "rows": 6, "score": "bleu", "by": "answer", "train_score": 99.0, "method": "exact"}


def test_the_share_of_rows_whose_example_has_their_own_answer_is_counted_over_training_rows(tmp_path):
    run = RunDir(tmp_path)
    run.rows.mkdir()
    write_rows(run.rows_of("train").path, [Row(str(i), f"query {i}", f"answer {i % 3}") for i in range(6)])
    examples = {"0": ["3", "1"], "1": ["2"], "2": ["1", "5"], "3": [], "4": ["1"], "5": ["0"], "test-0": ["0"]}
    columns = {
        "id": list(examples), "split": ["train"] * 6 + ["test"], "neighbours": list(examples.values()),
        "scores": [[1.0] * len(found) for found in examples.values()],
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), run.neighbours)
    assert same_answer_share(run) == pytest.approx(3 / 6)


def test_examples_that_give_the_answer_away_are_named():
    assert "own answer" not in summarise_facts(FACTS)
    few, many = (summarise_facts({**FACTS, "same_answer": share}) for share in (0.2, 0.9))
    assert "20% of train rows have an example with their own answer" in few and "retrieve.by" not in few
    assert "90% of train rows" in many and "take retrieve.by=query or schedule.shots=0" in many


def test_scores_that_tell_nothing_apart_are_named():
    assert "all scores are 0" not in summarise_facts(FACTS)
    said = summarise_facts({**FACTS, "train_score": 0.0})
    assert "all scores are 0, so examples were chosen by their ids alone" in said and "retrieve.score=rouge-l" in said
    assert "retrieve.score" not in summarise_facts({**FACTS, "train_score": 0.0, "score": "rouge-l"})


def test_neighbours_are_there_with_as_many_as_the_run_asks_for(tmp_path):
    run, config = RunDir(tmp_path), RunConfig(name="t", run_dir=str(tmp_path)).replace(**{"schedule.shots": 2})
    run.neighbours.write_bytes(b"found")
    facts = {"fingerprint": "f", "sha256": digest_file(run.neighbours), "shots": 2}
    run.neighbours.with_suffix(".json").write_text(json.dumps(facts))
    assert has_neighbours(config, run, "f") and not has_neighbours(config, run, "g")
    assert not has_neighbours(config.replace(**{"evaluate.shots": 3}), run, "f")
