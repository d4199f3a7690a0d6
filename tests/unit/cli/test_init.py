"""`pi-ray init`: what is written can be run, and nothing is overwritten."""

from importlib.resources import files

import pytest
import yaml

from pi_ray.cli import main
from pi_ray.cli.init import write_task
from pi_ray.config.run_file import load_run_file, parse_run_file
from pi_ray.errors import ConfigError
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder, Template
from pi_ray.protocols import SPLITS, Row
from pi_ray.tasks.jsonl import JsonlTask


def test_a_written_task_loads_without_rejects_and_without_a_shared_query(tmp_path):
    write_task(tmp_path / "mine")
    task = JsonlTask(load_run_file(tmp_path / "mine" / "run.yaml").task)
    rows = [row for split in SPLITS for row in task.rows(split)]
    assert len(rows) == 6 and all(isinstance(row, Row) for row in rows)
    assert len({row.query.casefold() for row in rows}) == len({row.id for row in rows}) == 6


def test_the_template_explains_placeholders_in_comments_that_are_not_sent(tmp_path):
    write_task(tmp_path)
    written = (tmp_path / "template.md").read_text()
    template = Template.parse(written)
    assert "survive compression" in written and "survive" not in template.text
    assert "{{team}}" in template.instruction and len(template.documents) == 2
    assert "# Documents\n" not in written.partition("-->")[2], "headings alone make documents"


def test_run_yaml_comments_every_key_in_labelled_blocks(tmp_path):
    write_task(tmp_path)
    text = (tmp_path / "run.yaml").read_text()
    data = yaml.safe_load(text)
    assert list(data) == ["name", "task", "model", "prompt", "schedule", "train"]
    keys = [line for line in text.splitlines() if line.startswith("  ") and "name: linear" not in line]
    assert 10 <= len(keys) <= 14 and all(" # " in line for line in keys)


def test_an_existing_file_is_never_overwritten_and_nothing_else_is_written(tmp_path):
    (tmp_path / "dev.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"dev\.jsonl already there"):
        write_task(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["dev.jsonl"] and (tmp_path / "dev.jsonl").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_an_error_with_a_cure(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        write_task(tmp_path / "x")


def test_the_written_paths_are_returned(tmp_path):
    written = sorted(p.name for p in write_task(tmp_path / "a" / "b"))
    assert written == ["dev.jsonl", "run.yaml", "template.md", "test.jsonl", "train.jsonl"]


def test_the_demo_takes_another_base(monkeypatch):
    started = []
    monkeypatch.setattr("pi_ray.cli.run.run_and_tell", lambda config, args: started.append(config.model))
    assert main(["demo", "--model", "gemma3-270m", "model.accept_licence=gemma"]) == 0
    assert (started[0].base, started[0].accept_licence) == ("gemma3-270m", "gemma")
    assert main(["demo"]) == 0 and started[1].base == "smollm2-135m"
    assert main(["demo", "--model", "gemma3-270m"]) == 2 and len(started) == 2


def test_the_demo_run_loads():
    config = parse_run_file(files("pi_ray.cli").joinpath("demo.yaml").read_text(), "demo.yaml")
    assert config.name == "demo" and config.task.name == "opsql"
    PromptEncoder(load_tokenizer(config.model), config.prompt)  # its chat frame suits its model
