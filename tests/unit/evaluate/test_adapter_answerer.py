"""An evaluation also asks the trained adapter about its prompt's units, in the same work as the test rows."""

import json

import pytest

from pi_ray.evaluate import generation_workers
from pi_ray.evaluate.adapter_answerer import QUESTIONS, AdapterAnswerer
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

DONE: list = []  # what was generated, in turn
KILLED = {"after": 0}


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
    """A trained run of four rows in each split, whose generation needs no Ray."""
    DONE.clear()
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

    def run_here(config, columns, work, lengths, actors=0, engine="transformers"):
        adapters = [c.adapter for c in columns if c.adapter]
        generator = Generator(config.model, config.prompt, adapters, AnswerLengths(6, 2))
        for place, item in enumerate(work):
            yield place, generator(item)
            DONE.append(item)
            if len(DONE) == KILLED["after"]:
                raise KeyboardInterrupt

    monkeypatch.setattr(generation_workers, "run_work", run_here)
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


def generated():
    """(column, rows) of what was generated since the last call, without what was timed."""
    found = [(item["column"], item["rows"]) for item in DONE if "timed" not in item]
    DONE.clear()
    return found


def test_what_was_generated_is_not_generated_again(config, monkeypatch):
    """After a kill, and after a change that no answer depends on."""
    monkeypatch.setitem(KILLED, "after", 4)
    run, config = RunDir(config.root), config.replace(**{"evaluate.batch_size": 2})
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(config, columns=columns_of(config))
    assert generated() == [("base", [0, 1]), ("base", [2, 3]), ("promptintern", [0, 1])]
    KILLED["after"] = 0
    found = evaluate_run(config, columns=columns_of(config))
    assert generated() == [("promptintern", [2, 3]), (QUESTIONS, [0, 1]), (QUESTIONS, [2, 3])]
    assert found["base"]["latency_s"] > 0 and found["promptintern"]["latency_merged_s"] > 0, "timed anew"
    scored = [found[name]["exact_match"] for name in ("base", "promptintern")]
    rescored = config.replace(**{"evaluate.bootstrap": 20, "task.metric": ["f1"]})
    again = evaluate_run(rescored, columns=columns_of(config))
    assert not generated() and "f1" in again["base"]
    kept = (run.evaluation / "outputs.jsonl").read_text()
    run.generation_log.unlink()
    alone = evaluate_run(config, columns=columns_of(config))
    whole = (run.evaluation / "outputs.jsonl").read_text()
    assert len(generated()) == 6 and [alone[n]["exact_match"] for n in ("base", "promptintern")] == scored
    texts = [[json.loads(line)["outputs"] for line in text.splitlines()] for text in (kept, whole)]
    assert texts[0] == texts[1]
    evaluate_run(config, columns=columns_of(config)[:1])
    assert len(run.generation_log.read_text().splitlines()) == 2, "what this evaluation does not need is gone"


def test_another_adapter_or_prompt_is_asked_anew(config, tiny_model):
    run = RunDir(config.root)
    evaluate_run(config, columns=columns_of(config))
    assert len(generated()) == 3
    with staged(run.adapter(0), fingerprint="g") as tmp:
        write_adapter(tmp, tiny_model, seed=2, facts=card(tiny_model))
    evaluate_run(config, columns=columns_of(config))
    assert [name for name, _ in generated()] == ["promptintern", QUESTIONS]
    other = [*columns_of(config), Column("base_full_prompt", "", LISTED, 0)]
    evaluate_run(config, columns=other)
    assert [name for name, _ in generated()] == ["base_full_prompt"]
    evaluate_run(config.replace(**{"evaluate.max_new_tokens": 3}), columns=other)
    assert [name for name, _ in generated()] == ["base", "promptintern", "base_full_prompt", QUESTIONS]


def test_rows_of_like_length_are_answered_together_and_keep_their_answers(config):
    columns, lengths = columns_of(config)[:1], AnswerLengths(6, 2)
    rows = [Row(f"test-{i}", "red? " * times, "k4") for i, times in enumerate((2, 5, 1, 3))]
    write_rows(RunDir(config.root).rows / "test.parquet", rows)
    texts = {}
    for size in (2, 3):
        DONE.clear()
        sized = config.replace(**{"evaluate.batch_size": size})
        texts[size] = AdapterAnswerer(sized).answer(columns, lengths, lambda *_: None)["base"].texts
        batches = [[len(ids) for ids in item["prompts"]] for item in DONE if "timed" not in item]
        flat = [length for batch in batches for length in batch]
        assert list(map(len, batches)) == {2: [2, 2], 3: [3, 1]}[size]
        assert flat == sorted(flat, reverse=True) and len(set(flat)) == 4
    assert texts[2] == texts[3] and len(set(texts[2])) > 1
