"""After a change of the prompt the rows are those about it, corrected, and an anchor of others."""

import json

import pytest

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.row_store import write_rows
from pi_ray.tasks import changed_prompt
from pi_ray.tasks.changed_prompt import ChangedPromptTask, open_task
from pi_ray.tasks.jsonl import JsonlTask
from pi_ray.tasks.opsql.task import OpsqlTask

NAMES = ["billing", "logins", "delivery", "returns", "gifts", "parking", "invoices", "taxes"]
CODES = {name: f"{name[:2]}{i}" for i, name in enumerate(NAMES)}


def template(codes):
    return "Answer with a code.\n\n## Queues\n\n" + "\n".join(f"{name}: {code}" for name, code in codes.items())


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(changed_prompt, "FEWEST_ANCHORS", 4)
    published = tmp_path / "published"
    published.mkdir()
    (published / "template.txt").write_text(template(CODES))
    (tmp_path / "template.md").write_text(template({**CODES, "billing": "z9", "logins": "z8", "snacks": "z7"}))
    rows = [(NAMES[i % 8], i) for i in range(80)]
    labelled = "".join(json.dumps({"query": f"{i}: {n}", "answer": CODES[n]}) + "\n" for n, i in rows)
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(labelled.replace('": "', f'": "{split} ', 1))
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": f"please, {n} {i}"}) + "\n" for n, i in rows))
    paths = {key: str(tmp_path / f"{key}.jsonl") for key in ("train", "dev", "test", "queries")}
    return TaskConfig(**paths, template=str(tmp_path / "template.md"), published=str(published))


def of(task, split):
    return [row for row in task.rows(split) if isinstance(row, Row)]


def test_labels_follow_the_new_prompt_in_every_split(config):
    task = open_task(config)
    for split in ("train", "dev", "test"):
        answers = {row.query.split(" ")[-1]: row.answer for row in of(task, split)}
        assert answers["billing"] == "z9" and answers["logins"] == "z8" and answers.get("taxes", "ta7") == "ta7"
    assert len(of(task, "test")) == 80


def test_the_rows_about_the_change_are_all_there_and_the_others_an_anchor(config):
    task = open_task(config)
    for split in ("train", UNLABELLED):
        rows = of(task, split)
        about = [row for row in rows if "billing" in row.query or "logins" in row.query]
        assert len(about) == 20 and len(rows) == 60
    counts = task.count()
    assert (counts.exchanged, counts.dropped, counts.rows) == (60, 0, 120)
    assert "40 rows and queries about the change, 80 replayed" in str(counts)


def test_a_new_unit_that_nobody_asks_about_is_named(config):
    assert open_task(config).unasked() == ["Queues: snacks: z7"]


def test_generated_queries_of_the_published_run_are_asked_again(config):
    write_rows(open_task(config).folder / "unlabelled.parquet", [Row("g-1", "are there snacks?", "")])
    assert [row.query for row in of(open_task(config), UNLABELLED)][-1] == "are there snacks?"
    assert open_task(config).unasked() == []


def test_a_task_whose_queries_were_all_generated_adds_none_of_its_own(config, tmp_path):
    (tmp_path / "template.txt").write_text(OpsqlTask(TaskConfig()).template().text)
    write_rows(tmp_path / "unlabelled.parquet", [Row("g-1", "a generated query", "")])
    named = TaskConfig(name="opsql", published=str(tmp_path))
    assert len(of(open_task(named), UNLABELLED)) > 1
    assert [row.id for row in of(open_task(named.model_copy(update={"queries": ""})), UNLABELLED)] == ["g-1"]


def test_the_fingerprint_is_of_both_prompts(config):
    before = open_task(config).fingerprint()
    assert before != JsonlTask(config).fingerprint()
    (open_task(config).folder / "template.txt").write_text(template(CODES) + "\nmore: m1")
    assert open_task(config).fingerprint() != before


def test_without_the_old_prompt_the_error_says_what_to_do(config, tmp_path):
    assert isinstance(open_task(config.model_copy(update={"published": ""})), JsonlTask)
    with pytest.raises(DataError, match="pi-ray refresh"):
        ChangedPromptTask(config.model_copy(update={"published": str(tmp_path)}))
