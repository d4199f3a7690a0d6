"""A teacher that is not trained here: the base answers before the first update, and every phase learns from it."""

import json
from dataclasses import replace

import pytest

from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError
from pi_ray.models import load_model, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import write_rows
from pi_ray.train import answer_scores, distill
from pi_ray.train.batches import PhaseDataset, plain_batch
from pi_ray.train.drills import why_not_drilled
from pi_ray.train.teacher_rows import open_teacher_rows
from pi_ray.train.trainer import train_worker
from tests.prepared import LISTED, prepare_by_hand, tiny_config
from tests.unit.train.test_distill import adapter_hash, labels_of, rows_of
from tests.unit.train.test_train import dies_and_goes_on, log_of, settings


def prepared(model, root, **changes):
    teacher = {
        "train.objective": "distill", "train.distill.teacher": "base", "train.distill.top_k": 4,
        "train.distill.label_weight": 0.0,  # so that the base judges labels too
    }
    config = tiny_config(model, root, **{"schedule": {"phases": 1, "epochs": 2}, **teacher, **changes})
    prepare_by_hand(config, whole=LISTED)
    with staged(RunDir(root).templates, fingerprint="by-hand") as folder:
        (folder / "templates.json").write_text(json.dumps([{"rate": 1.0, "text": LISTED}]))
    return config


@pytest.fixture(scope="module")
def taught(tiny_model, tmp_path_factory):
    config = prepared(tiny_model, tmp_path_factory.mktemp("taught"))
    train_worker(settings(config))
    return config


def test_the_base_answers_before_the_first_update_of_the_only_phase(taught):
    entries = log_of(taught)
    first = next(i for i, entry in enumerate(entries) if "loss" in entry)
    assert any(entry.get("event") == "teacher_answers" and entry["step"] == 0 for entry in entries[:first])
    updates = [entry for entry in entries if "loss" in entry]
    assert [entry["phase"] for entry in updates] == [0] * 6 and updates[-1]["loss"] < updates[0]["loss"]


def test_the_base_reads_the_whole_prompt_where_the_student_sees_the_query_alone(taught):
    run, bare = RunDir(taught.root), load_model(taught.model, "cpu").eval()
    data, encoder = PhaseDataset(run.phase(0)), PromptEncoder(load_tokenizer(taught.model), taught.prompt)
    assert data.prefix == encoder.prefix("")
    views = distill.view_prefixes(taught)
    assert views[0] == encoder.prefix(LISTED) and len(views) == 2
    again = answer_scores.score_answers(bare, plain_batch, views, data, labels_of(data), 4, 5)
    found = [row["confidence"] for row in rows_of(taught) if row["labelled"]]
    assert found == pytest.approx([row["confidence"] for row in again], abs=1e-3)


def test_the_base_reads_whole_documents_where_the_first_phase_has_none(tiny_model, tmp_path):
    config = prepared(tiny_model, tmp_path)
    run, encoder = RunDir(tmp_path), PromptEncoder(load_tokenizer(config.model), config.prompt)
    assert isinstance(open_teacher_rows(config, "train"), PhaseDataset), "rows without documents are read as they are"
    write_rows(run.rows_of("train").path, [replace(r, documents=("A passage.",)) for r in run.rows_of("train")[:]])
    prompt, label = open_teacher_rows(config, "train").take([1])[0]
    row = run.rows_of("train")[1]
    assert (prompt, label) == (encoder.row(row.query, documents=["A passage."]), encoder.answer(row.answer))


def test_the_longest_row_counts_the_prompt_that_only_the_teacher_reads(taught):
    prefix, data = distill.view_prefixes(taught)[0], PhaseDataset(RunDir(taught.root).phase(0))
    assert distill.longest_row_tokens(taught) > len(prefix) + data.tokens["row_max"]
    assert why_not_drilled(taught) == "no phase reads the whole template"


def test_a_run_that_dies_goes_on_to_the_same_adapter(taught, tiny_model, tmp_path, monkeypatch):
    config = prepared(tiny_model, tmp_path, **{"train.checkpoint_every": 2})
    dies_and_goes_on(config, 3, monkeypatch)
    assert adapter_hash(config, 0) == adapter_hash(taught, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: {train: ''}", "without labelled rows nothing trains a teacher"),
        ("task: {train: ''}\ntrain: {objective: distill}", "train.distill.teacher base or endpoint"),
        ("task: {train: '', queries: ''}\ntrain: {objective: distill, distill: {teacher: base}}", "are both empty"),
        (
            "train: {objective: distill, distill: {teacher: base}}\nschedule: {phases: 1, rate_end: 1}",
            "a phase with less than the whole template",
        ),
        ("task: {name: opsql}\ntrain: {objective: distill, distill: {teacher: endpoint}}", "queries of your own"),
        (
            "task: {train: ''}\ntrain: {objective: distill, distill: {teacher: base, agreement: weight}}",
            "take filter or off",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused_at_once(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_run_file(f"name: a\n{text}", "run.yaml")
