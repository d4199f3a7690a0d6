"""Which columns a run has, and what is said where it is not ready for them."""

import json
from dataclasses import replace

import pytest

from pi_ray.errors import DataError, TrainingError
from pi_ray.evaluate.columns import Column, columns_of, require_examples
from pi_ray.run.artifact import staged, write_atomic
from pi_ray.run.directory import CARD_FILE, RunDir
from pi_ray.run.phases import plain_finetuning_config
from tests.prepared import tiny_config

TEMPLATES = [{"rate": rate, "text": f"template at {rate}"} for rate in (1.0, 0.5)]
CARD = {"template": "", "shots": 0, "rate": 0.0}


def choose(run):
    """An adapter as training leaves it."""
    with staged(run.adapter(2)) as folder:
        write_atomic(folder / CARD_FILE, json.dumps(CARD))
    run.choose_best(2)


def test_what_is_missing_is_said_with_the_command_that_makes_it(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path / "run")
    run = RunDir(config.root)
    with pytest.raises(TrainingError, match="nothing prepared; run 'pi-ray prepare'"):
        columns_of(config)
    with staged(run.rows, fingerprint="f"):
        pass
    with staged(run.templates, fingerprint="f") as folder:
        write_atomic(folder / "templates.json", json.dumps(TEMPLATES))
    with pytest.raises(TrainingError, match="no baseline was trained; run 'pi-ray train'"):
        columns_of(config)
    alone = config.replace(**{"evaluate.baseline": False})
    with pytest.raises(TrainingError, match="no adapter was trained; run 'pi-ray train'"):
        columns_of(alone)
    choose(run)
    assert [column.name for column in columns_of(alone)] == ["base", "base_full_prompt", "promptintern"]
    choose(RunDir(plain_finetuning_config(config).root))
    assert [column.name for column in columns_of(config)] == ["base", "base_full_prompt", "plain", "promptintern"]


@pytest.mark.parametrize("stored", [None, 2])
def test_more_examples_than_were_retrieved_are_refused(tiny_model, tmp_path, stored):
    config = tiny_config(tiny_model, tmp_path / "run")
    if stored:
        write_atomic(RunDir(config.root).neighbours.with_suffix(".json"), json.dumps({"shots": stored}))
    column = Column("base_full_prompt", "", "", 5)
    with pytest.raises(DataError, match=rf"prepare again: only {stored or 0} examples .* evaluate.shots is 5"):
        require_examples(config.replace(**{"evaluate.shots": 5}), [column])
    require_examples(config.replace(**{"evaluate.shots": stored or 0}), [replace(column, shots=2)])
