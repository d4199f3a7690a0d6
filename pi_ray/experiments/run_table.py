"""Run the sweep of a table file and print its table: what is done already is skipped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pi_ray import hosted, pipeline
from pi_ray.evaluate.columns import Column, trained_column, untrained_column
from pi_ray.evaluate.generation_workers import compare_latencies
from pi_ray.experiments import table
from pi_ray.experiments.sweep import Sweep, SweepRun, share_preparation
from pi_ray.progress import ProgressLine
from pi_ray.run.artifact import digest, write_atomic


def run_table(sweep: Sweep, console: Console, command: str) -> Path:
    """Run the missing runs, print the table, and merge its numbers into the results file, whose path is returned."""
    for i, run in enumerate(sweep.runs, start=1):
        console.rule(f"{i} of {len(sweep.runs)}: {run.column}, seed {run.seed}", align="left")
        share_preparation(sweep.runs, run)
        pipeline.prepare(run.config, console)
        if run.trained:
            pipeline.train(run.config, console)
        pipeline.evaluate(run.config, console, [_column_of(run)])
        table.read_summary(run.directory, run.trained, sweep.metric)  # before another run is trained for nothing
    latencies = {} if hosted.is_hosted(sweep.base) else _latencies(sweep, console)
    results = table.read_results(sweep)
    rows = list(table.table_rows(sweep, results, latencies))
    write_atomic(sweep.base.root / f"table-{sweep.config.table}.md", table.markdown_table(rows))
    for part in table.terminal_tables(f"Table {sweep.config.table}: {sweep.config.title}", rows):
        console.print(part)
    if sentence := table.recovered_gap(sweep, results)[0]:
        console.print(sentence, highlight=False)
    path = sweep.source.resolve().parent / sweep.config.results
    table.merge_results(path, table.result_entries(sweep, results, latencies, command))
    console.print(f"[bold]Numbers[/]  {pipeline.shortest_path(path)}", highlight=False)
    return path


def _column_of(run: SweepRun) -> Column:
    return trained_column(run.config) if run.trained else untrained_column(run.config)


def _latencies(sweep: Sweep, console: Console) -> dict[str, Any]:
    """Column -> median seconds of a request, all on one engine, measured once for these adapters."""
    first = [r for r in sweep.runs if r.seed == sweep.config.seeds[0]]
    columns = [(replace(_column_of(r), name=r.column), r.config) for r in first]
    key = digest([(c.name, c.adapter, c.template, c.shots) for c, _ in columns])[:12]
    path = sweep.base.root / f"speed-{key}.json"
    if not path.exists():
        total = sweep.base.evaluate.latency_rows * len(columns)
        with ProgressLine(console, "  seconds a request", total) as shown:
            write_atomic(path, json.dumps(compare_latencies(columns, shown.update), indent=1) + "\n")
    return json.loads(path.read_bytes())
