"""The run that `pi-ray bake` makes of a prompt, and what it refuses before anything is written."""

import json

import pytest

from pi_ray.cli import main
from pi_ray.cli.bake import bake_config, choose_chat
from pi_ray.config import ModelConfig, dump_config
from pi_ray.config.run_file import parse_run_file
from pi_ray.schedule import plan_phases


@pytest.fixture
def prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My Prompt.md").write_text("Answer with the code. red is k4.")
    (tmp_path / "q.jsonl").write_text(json.dumps({"query": "red?"}) + "\n")
    return tmp_path / "My Prompt.md"


def test_a_prompt_alone_has_its_queries_written_and_answered_and_no_labelled_row(prompt, tiny_model):
    config = bake_config(prompt, None, False, [f"model.base={tiny_model}"])
    assert config.name == "my-prompt" and config.task.generate and config.ask.writer == "prompt"
    assert config.answers_first and not config.evaluate.baseline and config.prompt.chat == "chatml"
    (phase,) = plan_phases(config.schedule)
    assert (phase.rate, phase.shots) == (0.0, 0)
    assert parse_run_file(dump_config(config), "run.yaml") == config, "'pi-ray run' reads the same run"


def test_own_queries_are_used_in_place_of_generated_ones_or_beside_them(prompt, tiny_model):
    own = prompt.with_name("q.jsonl")
    alone = bake_config(prompt, own, False, [f"model.base={tiny_model}"])
    assert alone.task.queries == str(own) and not alone.task.generate
    both = bake_config(prompt, own, True, [f"model.base={tiny_model}", "name=both"])
    assert both.task.queries == str(own) and both.task.generate and both.name == "both"


def test_an_endpoint_that_answers_also_writes_the_queries(prompt, tiny_model):
    config = bake_config(prompt, None, False, [f"model.base={tiny_model}", "train.distill.teacher=endpoint"])
    assert config.ask.writer == "endpoint"


def test_a_chat_template_that_adds_a_system_prompt_gives_way_to_bare_chatml(tiny_model):
    assert choose_chat(ModelConfig(base=str(tiny_model))) == "chatml"


def test_nothing_is_written_for_a_prompt_or_queries_that_cannot_be_used(prompt, tiny_model, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    empty = prompt.with_name("empty.md")
    empty.write_text("\n")
    model = f"model.base={tiny_model}"
    for arguments, code, says in (
        ([str(empty), model], 3, "the template is empty"),
        (["none.md", model], 3, "no such template file"),
        ([str(prompt), "--queries", "none.jsonl", model], 2, "--queries none.jsonl: no such file"),
        ([str(prompt), model, "task.test=test.jsonl"], 2, "test.jsonl: no such file"),
        ([str(prompt), model, "train.distill.teacher=adapter"], 2, "nothing trains a teacher"),
        ([str(prompt), model, "train.distill.teacher=endpoint"], 2, "OPENAI_API_KEY is empty"),
    ):
        assert main(["bake", *arguments]) == code
        assert says in capsys.readouterr().err
    assert not (prompt.parent / "runs").exists()
