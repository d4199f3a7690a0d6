"""run.yaml: defaults, overrides, and mistakes that are named with file, line, key and cure."""

import json

import pytest

from pi_ray import cli, config
from pi_ray.config import run_file
from pi_ray.errors import ConfigError


@pytest.mark.parametrize("text, message", [
    ("name: a\ntrain:\n  lrr: 3\n", "t.yaml:3: unknown key 'train.lrr'; did you mean 'train.lr'?"),
    ("trian: {}\nname: a", "t.yaml:1: unknown key 'trian'; did you mean 'train'?"),
    ("name: a\ntask: {rows: {trian: 3}}", "t.yaml:2: unknown key 'task.rows.trian'; did you mean 'task.rows.train'?"),
    ("name: a\ntrain:\n  lr: fast", "t.yaml:3: train.lr: Input should be a valid number"),
    ("name: a\ntrain:\n  workers: 0", "t.yaml:3: train.workers: Input should be greater than or equal to 1"),
    ("name: ../a", "t.yaml:1: name: String should match pattern"),
    ("task: {}", "key 'name' is missing"),
    ("name: a\ntrain: {batch_size: 7}", "train.batch_size 7 cannot be shared by train.workers 2"),
    ("name: a\nschedule: {rate_start: 0.2, rate_end: 0.5}", "the template must shrink"),
    ("name: a\nprompt: {query: hello}", "prompt.query must contain {query}"),
    ("name: a\nserve: {min_replicas: 3}", "serve.min_replicas 3 is above"),
    ("name: a\nschedule: {name: list, shots: 3, list: [{rate: 1, shots: 0}]}", "t.yaml:2: schedule: schedule.shots would have no effect: with name: list each phase in schedule.list has its own; leave it out"),
    ("name: a\nschedule: {name: list, epochs: [1], list: [{rate: 1, shots: 0}]}", "schedule.epochs would have no effect"),
    ("name: a\nschedule: {name: constant, rate_end: 0.3}", "schedule.rate_end would have no effect: name: constant keeps rate_start throughout"),
    ("name: a\ntrain: {backend: {name: ddp, zero_stage: 3}}", "train.backend.zero_stage would have no effect"),
    ("name: a\ntrain: {lora: {method: ia3, alpha: 3}}", "train.lora.alpha would have no effect"),
    ("name: a\ntrain: {share_prefix: false, attention: flex}", "train.attention would have no effect"),
    ("name: [", "not valid YAML"),
    ("- a", "expected labelled blocks"),
])
def test_a_mistake_is_named_with_its_place_and_cure(text, message):
    with pytest.raises(ConfigError) as error:
        run_file.parse(text, "t.yaml")
    assert message in str(error.value)


def test_overrides_reach_into_blocks_and_their_mistakes_are_said_to_be_the_command_lines():
    assert run_file.parse("name: a", "t.yaml", ["train.lr=0.1", "task.rows={train: 5}"]).task.rows.train == 5
    with pytest.raises(ConfigError, match=r"command line: unknown key 'train\.lrr'"):
        run_file.parse("name: a", "t.yaml", ["train.lrr=0.1"])
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        run_file.parse("name: a", "t.yaml", ["train.lr"])


def test_what_show_prints_reads_back_to_the_same_config():
    first = run_file.parse("name: a\nschedule: {epochs: [1, 2, 3]}", "t.yaml")
    assert run_file.parse(config.dump(first), "shown") == first


@pytest.mark.parametrize("text", [
    "schedule: {name: list, list: [{rate: 1, shots: 0}]}", "schedule: {name: constant, rate_start: 0.5, rate_end: 0.5}", "train: {backend: {name: ddp, zero_stage: 2}}",
    "train: {lora: {method: ia3}}", "train: {share_prefix: false, attention: sdpa}",
])  # fmt: skip
def test_what_has_its_default_is_not_said_to_be_without_effect(text):
    first = run_file.parse(f"name: a\n{text}", "t.yaml")
    assert run_file.parse(config.dump(first), "shown") == first


def test_relative_paths_start_from_the_run_file(tmp_path):
    (tmp_path / "run.yaml").write_text("name: a\ntask: {train: rows.jsonl}")
    assert run_file.load(tmp_path / "run.yaml").task.train == str(tmp_path / "rows.jsonl")


def test_a_missing_run_file_says_how_to_get_one():
    with pytest.raises(ConfigError, match="pi-ray init"):
        run_file.load("nowhere/run.yaml")


def test_the_schema_describes_every_block():
    assert {"task", "model", "schedule", "train", "evaluate", "serve"} <= set(json.loads(config.schema())["properties"])


def test_what_is_missing_on_the_command_line_is_the_run_file_and_not_the_overrides(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan"])
    said = capsys.readouterr().err
    assert "required: run.yaml" in said and "section.key" not in said.splitlines()[-1]
