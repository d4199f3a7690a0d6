"""Which questions an adapter is asked about its prompt's units, and what its answers say of each unit."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi_ray.evaluate.columns import Column
from pi_ray.evaluate.unit_questions import DEV_ROWS_OF_UNIT, plan_questions
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import MANIFEST_HASH, staged, verify_artifact, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import write_rows
from pi_ray.train import distilled_rows
from tests.prepared import LISTED, prepare_by_hand, tiny_config

QUERIES = ["is red on sale?", "the code for blue, please", "a green one", "what about black?", "what about BLACK again"]
ANSWERS = {0: ("k4", 1.0, True), 1: ("z9", 1.0, False), 2: ("q1", 0.5, False), 3: ("b7", 1.0, True)}


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    """A prepared run whose teacher answered four of five queries, two of which are held out."""
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("run"), **{"train.objective": "distill"})
    prepare_by_hand(config, whole=LISTED)
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    write_atomic(run.templates / "templates.json", json.dumps([{"rate": 1.0, "text": LISTED}]))
    write_rows(run.rows_of("dev").path, [Row(f"dev-{i}", f"dev {i}: is it red?", "k4") for i in range(9)])
    write_rows(run.rows_of(UNLABELLED).path, [Row(f"q-{i}", query, "") for i, query in enumerate(QUERIES)])
    rows = [
        {
            "labelled": False, "number": n, "label_ids": encoder.answer(text), "confidence": 0.0,
            "agreement": agreement, "held_out": held, "top_ids": [], "top_logprobs": [],
        }
        for n, (text, agreement, held) in ANSWERS.items()
    ]
    with staged(run.teacher_answers, fingerprint="f") as tmp:
        pq.write_table(pa.Table.from_pylist(rows, distilled_rows.SCHEMA), tmp / distilled_rows.FILE)
    with staged(run.adapter(0), fingerprint="f") as tmp:
        (tmp / "weights").write_text("w")
    return config


def test_questions_are_held_out_queries_and_a_few_dev_rows(config):
    asked = plan_questions(config).questions
    assert [(q.query, q.expected, q.source) for q in asked[:2]] == [
        (QUERIES[0], "k4", "teacher"), (QUERIES[3], "b7", "teacher"),
    ]
    assert [q.split for q in asked[2:]] == ["dev"] * (DEV_ROWS_OF_UNIT - 1), "red has a held-out query already"


def test_rows_and_queries_are_counted_by_unit(config):
    found = plan_questions(config)
    place = {unit.text.split(":")[0]: i for i, unit in enumerate(found.index.units)}
    count = {name: [c[place[name]] for c in (found.rows, found.queries, found.sure)] for name in ("red", "green")}
    assert count == {"red": [3, 1, 1], "green": [3, 1, 0]}, "the teacher's views differ on the green one"
    assert found.queries[place["black"]] == 2, "one of them without an answer"


def test_the_answers_say_what_is_known(config):
    found, run = plan_questions(config), RunDir(config.root)
    answers = [" k4 ", "b8", "k4", "r1", "k4"]
    knowledge = found.knowledge(answers, str(run.adapter(0)), config.task)
    assert knowledge.adapter_sha256 == verify_artifact(run.adapter(0))[MANIFEST_HASH]
    units = {unit.name: unit for unit in knowledge.units}
    assert (units["red"].asked, units["red"].agreed, units["red"].verdict) == (4, 3, "known")
    assert units["red"].examples[0].answer == "r1", "wrong answers are shown first"
    assert [(e.expected, e.source, e.answer, e.right) for e in units["black"].examples] == [
        ("b7", "teacher", "b8", False),
    ]
    assert [units[name].verdict for name in ("blue", "green")] == ["not asked", "teacher unsure"]
    assert "ask again for: black, green" in knowledge.sentence


def test_questions_are_asked_with_the_columns_prompt(config):
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    prompts = plan_questions(config).prompts(config, Column("promptintern", "", "", 0), encoder)
    assert prompts[:2] == [encoder.row(QUERIES[0]), encoder.row(QUERIES[3])]


def test_without_a_teacher_dev_rows_alone_are_asked(config):
    asked = plan_questions(config.replace(**{"train.objective": "sft"}))
    assert {q.split for q in asked.questions} == {"dev"} and not asked.queries


def test_answers_are_marked_by_the_first_metric_and_by_exact_match_where_it_cannot(config):
    found, run = plan_questions(config), RunDir(config.root)
    answers = ["K4!", "B 7", "nothing", "K4", "k4"]
    by_words = config.replace(**{"task.metric": ["normalized"]}).task
    knowledge = found.knowledge(answers, str(run.adapter(0)), by_words)
    units = {unit.name: unit for unit in knowledge.units}
    assert (units["red"].asked, units["red"].agreed) == (4, 3) and units["black"].agreed == 0
    by_json = config.replace(**{"task.metric": ["json"]}).task
    strict = {u.name: u.agreed for u in found.knowledge(answers, str(run.adapter(0)), by_json).units}
    assert strict["red"] == 1, "the expected answers are no JSON"
