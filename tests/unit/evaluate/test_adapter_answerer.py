"""An evaluation also asks the trained adapter about its prompt's units, in the same work as the test rows."""

import json

import pytest

from pi_ray.evaluate import adapter_answerer
from pi_ray.evaluate.columns import AnswerLengths, Column
from pi_ray.evaluate.evaluate import evaluate_run
from pi_ray.evaluate.generation_workers import Generator
from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE, read_knowledge
from pi_ray.protocols import Row
from pi_ray.run.artifact import staged, verify_artifact, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import write_rows
from tests.lora import card, write_adapter
from tests.prepared import COLOURS, LISTED, tiny_config


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
    """A trained run of four rows in each split, whose generation needs no Ray."""
    few = {"evaluate.latency_rows": 1, "evaluate.probe": False, "evaluate.bootstrap": 10}
    config = tiny_config(tiny_model, tmp_path, **few)
    run = RunDir(config.root)
    with staged(run.rows, fingerprint="f") as tmp:
        for split in ("train", "dev", "test"):
            rows = [Row(f"{split}-{i}", f"{split}: {name}?", code) for i, (name, code) in enumerate(COLOURS.items())]
            write_rows(tmp / f"{split}.parquet", rows)
    write_atomic(run.templates / "templates.json", json.dumps([{"rate": 1.0, "text": LISTED}]))
    with staged(run.adapter(0), fingerprint="f") as tmp:
        write_adapter(tmp, tiny_model, facts=card(tiny_model))
    write_atomic(run.train_log, "")

    def run_here(config, columns, work, lengths, actors=0):
        adapters = [c.adapter for c in columns if c.adapter]
        generator = Generator(config.model, config.prompt, adapters, AnswerLengths(6, 2))
        yield from ((place, generator(item)) for place, item in enumerate(work))

    monkeypatch.setattr(adapter_answerer, "run_work", run_here)
    return config


def columns_of(config):
    return [Column("base", "", "", 0), Column("promptintern", str(RunDir(config.root).adapter(0)), "", 0)]


def test_what_the_adapter_knows_is_a_file_of_the_evaluation(config):
    run, watched = RunDir(config.root), []
    evaluate_run(config, lambda name, done, total: watched.append((name, total)), columns_of(config))
    assert KNOWLEDGE_FILE in verify_artifact(run.evaluation)["files"]
    found = {unit.name: unit for unit in read_knowledge(run.evaluation).units}
    assert {name: (found[name].rows, found[name].asked) for name in COLOURS} == dict.fromkeys(COLOURS, (1, 1))
    (example,) = found["red"].examples
    assert (example.query, example.expected, example.source) == ("dev: red?", "k4", "label")
    assert {total for name, total in watched if "latency" not in name} == {4}, "progress counts test rows alone"


def test_the_bare_base_or_a_run_that_does_not_want_it_is_asked_nothing(config):
    evaluate_run(config, columns=columns_of(config)[:1])
    assert read_knowledge(RunDir(config.root).evaluation) is None
    evaluate_run(config.replace(**{"evaluate.knows": False}), columns=columns_of(config))
    assert read_knowledge(RunDir(config.root).evaluation) is None
