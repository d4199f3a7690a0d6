"""Datasets of phases as training reads them: without rows, with turns that are fed and not learned, and with rows that
are longer than the context.
"""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig
from pi_ray.data import prepare
from pi_ray.data.phase_dataset import SCHEMA, PhaseData, TokeniseRows, publish_phase
from pi_ray.data.pieces import RowRange
from pi_ray.errors import DataError, ModelError
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder
from pi_ray.protocols import Row
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import read_range, write_rows
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
    rows = {
        "id": ["plain", "talk"], "prompt_ids": [[1, 2, 3], [4]], "label_ids": [[5], [6, 7, ~8, ~9, 10]],
        "left_out": [0, 0],
    }
    pq.write_table(pa.table(rows, schema=SCHEMA), tmp_path / "work" / "part-00000.parquet")
    phase = {"rate": 0.0, "shots": 0}
    made = publish_phase(tmp_path / "work", tmp_path / "done", [1, 2], fingerprint="f", template="", phase=phase)
    assert made["tokens"] == {"prefix": 2, "row_mean": 3, "row_max": 4, "label_mean": 2, "label_max": 2}
    data = PhaseDataset(tmp_path / "done")
    assert data.prompt_lengths.tolist() == [3, 3] and data.label_lengths.tolist() == [1, 3]
    assert data.take([1]) == [([4], [6, 7, ~8, ~9, 10])]


def test_a_row_that_is_longer_than_the_models_context_is_an_error_and_leaves_nothing_sealed(tmp_path):
    def publish(context):
        (tmp_path / "work").mkdir(exist_ok=True)
        rows = {"id": ["fed", "learned"], "prompt_ids": [[1] * 6, [1]], "label_ids": [[2], [2] * 5], "left_out": [0, 0]}
        pq.write_table(pa.table(rows, schema=SCHEMA), tmp_path / "work" / "part-00000.parquet")
        manifest = {"fingerprint": "f", "template": "", "phase": {"rate": 1.0, "shots": 0}}
        return publish_phase(tmp_path / "work", tmp_path / "0", [1, 2], context, **manifest)

    said = r"phase 0: the template has 2 tokens and .* 7, and model\.base reads 8 in all; .*schedule\.shots"
    with pytest.raises(DataError, match=said):
        publish(8)
    assert not (tmp_path / "0").exists()
    assert publish(9)["tokens"]["row_max"] == 6, "the longest prompt and the longest answer are those of two rows"


@pytest.mark.parametrize(("conversation", "context"), [(False, 2048), (True, None)])
def test_rows_are_compared_with_the_context_that_the_model_names(tiny_model, monkeypatch, conversation, context):
    config = RunConfig.model_validate({"name": "long", "model": {"base": str(tiny_model)}})
    config = config.model_copy(update={"prompt": PromptConfig(conversation=conversation)})
    assert prepare._row_context(config) == context
    monkeypatch.setattr("pi_ray.models.load_model_config", unloadable)
    assert prepare._row_context(config) is None


def unloadable(model):
    raise ModelError("a tokenizer alone")


SHOTS = [Example(f"what is number {i}?", f"the answer {i}") for i in range(4)]


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return PromptEncoder(load_tokenizer(ModelConfig(base=str(tiny_model))), PromptConfig(chat="none"))


@pytest.mark.parametrize("kept", [4, 3, 1, 0])
def test_a_row_keeps_as_many_of_its_most_similar_examples_as_fit(encoder, kept):
    whole = encoder.row("which one?", SHOTS[4 - kept :])
    assert encoder.fitted_row("which one?", SHOTS, (), len(whole)) == (whole, 4 - kept)
    found, left_out = encoder.fitted_row("which one?", SHOTS, (), len(whole) - 1)
    assert left_out == min(4, 4 - kept + 1) and (len(found) < len(whole) or not kept)
    assert encoder.fitted_row("which one?", (), (), 0) == (encoder.row("which one?"), 0)


def tokenised(tmp_path, tiny_model, context):
    """Phase 0 of two rows with two examples each and a template of few tokens, as preparation makes it."""
    run = RunDir(tmp_path)
    config = RunConfig.model_validate({
        "name": "cut", "run_dir": str(tmp_path), "model": {"base": str(tiny_model)},
        "prompt": {"chat": "none", "context": context},
    })
    rows = [Row("short", "which?", "one"), Row("long", "which of these numbers is the third one?", "three")]
    bank = [Row(f"bank-{i}", shot.query, shot.answer) for i, shot in enumerate(SHOTS)]
    with staged(run.rows, fingerprint="f", rows={"train": 4, "dev": 2}) as folder:
        write_rows(folder / "train.parquet", bank)
        write_rows(folder / "dev.parquet", rows)
    names = [*(r.id for r in bank), *(r.id for r in rows)]
    pq.write_table(pa.table({"id": names, "neighbours": [["bank-0", "bank-1"]] * 6}), run.neighbours)
    with staged(run.templates, fingerprint="f") as folder:
        (folder / "templates.json").write_text(json.dumps([{"rate": 1.0, "text": "Count."}]))
    work = TokeniseRows(config, "f", [PhaseData("dev", "dev", 1.0, 2)])
    return work(read_range(run.rows / "dev.parquet"), RowRange("dev", 0, 2, 0))["dev"]


def test_a_context_leaves_out_examples_of_long_rows_and_counts_them(tmp_path, tiny_model, encoder):
    whole = tokenised(tmp_path / "whole", tiny_model, 0)
    assert whole["left_out"].to_pylist() == [0, 0]
    prefix, lengths = len(encoder.prefix("Count.")), pc.list_value_length(whole["prompt_ids"]).to_pylist()
    longest = prefix + lengths[1] + len(whole["label_ids"][1])
    assert prefix + lengths[0] + len(whole["label_ids"][0]) < longest
    cut = tokenised(tmp_path / "cut", tiny_model, longest - 1)
    assert cut["left_out"].to_pylist() == [0, 1]
    assert cut["prompt_ids"][0] == whole["prompt_ids"][0]
    assert cut["prompt_ids"][1].as_py() == encoder.row("which of these numbers is the third one?", SHOTS[:1])
    (tmp_path / "work").mkdir()
    pq.write_table(cut, tmp_path / "work" / "part-00000.parquet")
    phase = {"rate": 1.0, "shots": 2}
    made = publish_phase(tmp_path / "work", tmp_path / "done", [1], fingerprint="f", template="", phase=phase)
    assert made["cut_rows"] == 1


def test_a_row_that_is_too_long_without_examples_is_named(tmp_path, tiny_model, encoder):
    alone = encoder.encode("which of these numbers is the third one?", "Count.") + encoder.answer("three")
    assert tokenised(tmp_path / "fits", tiny_model, len(alone))["left_out"][1].as_py() == 2
    with pytest.raises(DataError, match=r"row long of dev is 1 tokens longer than prompt.context"):
        tokenised(tmp_path / "cut", tiny_model, len(alone) - 1)
