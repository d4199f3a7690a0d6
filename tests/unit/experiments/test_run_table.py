"""A table from its file to the results file, with the steps of the runs replaced by their results."""

import json

from rich.console import Console

from pi_ray import pipeline
from pi_ray.experiments import run_table, sweep
from tests.unit.experiments.test_table import SPEEDS, evaluated, table_file


def test_the_runs_are_done_and_their_table_is_printed_and_kept(tmp_path, monkeypatch):
    found, done = sweep.load_sweep(table_file(tmp_path)), []

    def evaluate(config, console, columns):
        run = next(r for r in found.runs if r.config is config)
        done.append(("evaluate", *columns))
        evaluated(run, {"base": 0, "full": 36, "none": 12, "mine": 30}[run.column] + run.seed)

    monkeypatch.setattr(pipeline, "prepare", lambda config, console: done.append(("prepare", config.train.seed)))
    monkeypatch.setattr(pipeline, "train", lambda config, console: done.append(("train", config.train.seed)))
    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    monkeypatch.setattr(run_table, "trained_column", lambda config: f"trained {config.train.seed}")
    monkeypatch.setattr(run_table, "untrained_column", lambda config: "base")
    monkeypatch.setattr(run_table, "_latencies", lambda sweep, console: SPEEDS)
    console = Console(width=200, record=True)
    path = run_table.run_table(found, console, "pi-ray table x")
    assert done[:5] == [("prepare", 0), ("evaluate", "base"), ("prepare", 0), ("train", 0), ("evaluate", "trained 0")]
    evaluations = [column for step, column in done if step == "evaluate"]
    assert evaluations == ["base", *["trained 0"] * 3, *["trained 1"] * 3]
    text = console.export_text()
    assert "1 of 7: base, seed 0" in text and "Table 9: a test" in text and "Seconds and cost of a request" in text
    assert "Gap recovered: 75%" in text and "150 ms" in text and "results.json" in text
    assert path == tmp_path / "results.json"
    assert {e["command"] for e in json.loads(path.read_text())} == {"pi-ray table x"}
    assert (found.base.root / "table-9.md").read_text().startswith("|  | Exact match (95%) |")
