"""`pi-ray bake` all the way on a tiny model: from a prompt and unlabelled queries to a published adapter."""

import json

import pytest

from pi_ray.cli import main
from pi_ray.config.run_file import load_run_file
from pi_ray.run.artifact import verify_artifact
from tests.answering import ANSWER, QUERIES, TEMPLATE, write_answering_model

pytestmark = pytest.mark.ray
SMALL = [
    "train.distill.max_tokens=6", "train.lora.rank=4", "schedule.epochs=1", "evaluate.latency_rows=1",
    "evaluate.probe=false",
]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory, ray_local):
    folder = tmp_path_factory.mktemp("bake")
    write_answering_model(folder / "model", tiny_model)
    (folder / "prompt.md").write_text(TEMPLATE)
    (folder / "queries.jsonl").write_text("".join(json.dumps({"query": query}) + "\n" for query in QUERIES))
    return folder


def bake(folder, monkeypatch, capsys, *arguments):
    """(exit code, output) of the command in `folder`."""
    monkeypatch.chdir(folder)
    code = main(["bake", "prompt.md", "--queries", "queries.jsonl", f"model.base={folder}/model", *SMALL, *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_prompt_and_queries_become_an_adapter_and_the_same_command_goes_on(folder, monkeypatch, capsys):
    code, out = bake(folder, monkeypatch, capsys)
    assert code == 0, out
    for step in ("Answer", "Prepare", "Train", "Evaluate", "Report", "Published", "Serve it", "Ask it"):
        assert step in out
    assert "answered 40 of 40 queries, 40 of them the same in all 2 orders of the prompt" in out
    run = folder / "runs" / "prompt"
    summary = json.loads((run / "eval" / "summary.json").read_text())
    assert summary["answered"]["kept"] == {"train": 28, "dev": 4, "test": 8} and summary["test_rows"] == 8
    assert set(summary) >= {"base", "base_full_prompt", "promptintern"} and "plain" not in summary
    assert summary["base_full_prompt"]["exact_match"] == 1.0, "the base agrees with itself"
    assert summary["promptintern"]["input_tokens"] < summary["base_full_prompt"]["input_tokens"]
    samples = [json.loads(line) for line in (run / "eval" / "samples.jsonl").read_text().splitlines()]
    assert {sample["answer"] for sample in samples} == {ANSWER}
    assert "Agreement with the teacher is measured, not truth" in (run / "report.html").read_text()
    published = folder / "store" / "prompt" / "v0001"
    files = verify_artifact(published)["files"]
    config = load_run_file(run / "run.yaml")
    assert config.answers_first and config.task.template == str(folder / "prompt.md")
    code, again = bake(folder, monkeypatch, capsys)
    assert code == 0 and "answer: nothing to do" in again and "prepare: nothing to do" in again, again
    assert verify_artifact(published)["files"] == files and not (published.parent / "v0002").exists()


def test_another_prompt_of_the_same_name_is_refused(folder, monkeypatch, capsys):
    other = folder / "elsewhere" / "prompt.md"
    other.parent.mkdir()
    other.write_text("Say yes.")
    monkeypatch.chdir(folder)
    assert main(["bake", str(other), "--queries", "queries.jsonl", f"model.base={folder}/model"]) == 2
    assert "the run of another prompt" in capsys.readouterr().err
