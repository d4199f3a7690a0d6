"""Asking on Ray: an adapter learns to write, actors sample its replies, and they become the run's unlabelled rows."""

import io
import json

import pytest
from rich.console import Console

from pi_ray import pipeline
from pi_ray.ask import filters
from pi_ray.cli import main
from pi_ray.config import RunConfig
from pi_ray.run.artifact import verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.queries import read_queries

pytestmark = pytest.mark.ray
COLOURS = {"red": "k4", "blue": "z9", "green": "q1", "black": "b7"}


@pytest.fixture
def config(tmp_path, tiny_model):
    for split, some in {"train": ("red", "blue"), "dev": ("red",), "test": ("blue",)}.items():
        lines = [json.dumps({"query": f"{split} {i}: {c}?", "answer": COLOURS[c]}) for i in range(3) for c in some]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    listed = "\n".join(f"{c}: {k}" for c, k in COLOURS.items())
    (tmp_path / "template.md").write_text(f"Translate a colour into its code.\n\n## Colours\n\n{listed}\n")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "dev", "test")}
    return RunConfig.model_validate({
        "name": "tiny", "run_dir": str(tmp_path / "run"), "model": {"base": str(tiny_model)},
        "prompt": {"chat": "chatml"}, "compress": {"name": "none"}, "evaluate": {"baseline": True},
        "task": {**files, "template": str(tmp_path / "template.md"), "queries": "generate"},
        "schedule": {"phases": 2}, "ask": {"updates": 2, "queries": 8, "rounds": 1},
        "train": {"objective": "distill", "workers": 1, "batch_size": 4, "backend": {"name": "ddp"}, "gpu": False},
    })


def test_prepare_asks_first_and_a_second_time_does_nothing(config, ray_local, monkeypatch, capsys):
    # a model of random weights writes no colour and no end, so only what is new matters here
    monkeypatch.setattr(filters.QueryFilter, "_is_about", lambda self, query, units, kind: True)
    monkeypatch.setattr(filters, "LENGTHS", 1000.0)
    console, run = Console(file=io.StringIO(), width=200), RunDir(config.root)
    pipeline.prepare(config, console)
    said, manifest = console.file.getvalue(), verify_artifact(run.queries)
    assert "Ask  " in said and said.index("Ask  ") < said.index("Prepare  ")
    assert manifest["writer"] == "adapter" and manifest["queries"] == len(read_queries(run)) > 0
    assert (run.root / "writer" / "adapters" / "phase-0" / "adapter_model.safetensors").is_file()
    assert [row.query for row in run.read_rows("unlabelled")] == [asked.query for asked in read_queries(run)]
    assert (run.phase("unlabelled-0") / "manifest.json").is_file()
    assert not (run.baseline("plain").root / "queries").exists()
    again = Console(file=io.StringIO(), width=200)
    pipeline.prepare(config, again)
    assert all(words in again.file.getvalue() for words in ("the queries are there", "run directory is up to date"))
    assert verify_artifact(run.queries) == manifest
    assert main(["ask", str(run.config)]) == 0
    out = capsys.readouterr().out
    assert "the queries are there" in out and all(colour in out for colour in COLOURS)
