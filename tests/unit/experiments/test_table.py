"""Sweeps and their tables: which runs there are, what they share, and what is printed and kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pi_ray.errors import ConfigError
from pi_ray.experiments import sweep, table
from pi_ray.run.directory import RunDir
from tests.unit.fake_run import column

JOBS = Path(__file__).parents[3] / "jobs"
SPEEDS = {"none": {"latency_s": 0.2, "latency_cached_s": 0.2, "latency_merged_s": 0.15}}


def table_file(folder: Path, **changes) -> Path:
    (folder / "run.yaml").write_text(f"name: small\nrun_dir: {folder}/runs/small\ntask: {{name: opsql}}\n")
    columns = {
        "base": {
            "label": "Base", "trained": False, "set": {"schedule": {"name": "list", "list": [{"rate": 1, "shots": 2}]}},
        },
        "full": {
            "label": "Full prompt", "paper": "Template",
            "set": {"schedule": {"name": "list", "list": [{"rate": 1, "shots": 2}]}},
        },
        "none": {"label": "No template", "set": {"schedule": {"name": "list", "list": [{"rate": 0, "shots": 0}]}}},
        "mine": {"label": "PromptIntern", "set": {"schedule.phases": 3}},
    }
    content = {
        "table": "9", "title": "a test", "run": "run.yaml", "seeds": [0, 1], "columns": columns, "mine": "mine",
        "full": "full", "none": "none",
    }
    (folder / "table.yaml").write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return folder / "table.yaml"


def evaluated(run, right: int, rows: int = 40) -> None:
    """As if the first `right` of `rows` answers were right."""
    name = "promptintern" if run.trained else "base"
    out = run.directory.evaluation
    out.mkdir(parents=True)
    summary = {
        "task": "opsql", "model": "small", "seed": run.seed, "test_rows": rows, "train_rows": 80,
        name: column("", right / rows, 50.0, 31.0, 4, 0.9, 0.8, {}),
    }
    (out / "summary.json").write_text(json.dumps(summary))
    lines = [
        {
            "id": str(i), "answer": f"answer {i}", "outputs": {name: f"answer {i}" if i < right else "?"},
            "scores": {name: {"exact_match": float(i < right)}},
        }
        for i in range(rows)
    ]
    (out / "outputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def done(tmp_path):
    found = sweep.load_sweep(table_file(tmp_path))
    for run in found.runs:
        evaluated(run, {"base": 0, "full": 36, "none": 12, "mine": 30}[run.column] + run.seed)
    return found


def test_a_sweep_is_columns_by_seeds_and_the_base_has_no_seed(tmp_path):
    found = sweep.load_sweep(table_file(tmp_path))
    assert [(m.column, m.seed) for m in found.runs] == [
        ("base", 0), ("full", 0), ("none", 0), ("mine", 0), ("full", 1), ("none", 1), ("mine", 1),
    ]
    assert len({m.config.run_dir for m in found.runs}) == 7
    assert all(m.config.train.seed == m.seed and not m.config.evaluate.baseline for m in found.runs)


def test_a_column_that_changes_gets_another_folder_and_equal_ones_of_two_tables_share_theirs(tmp_path):
    one, same = (sweep.load_sweep(table_file(tmp_path, table=name)) for name in ("1", "2"))
    other = sweep.load_sweep(tmp_path / "table.yaml", ["train.lr=0.01"])
    assert [m.config.run_dir for m in one.runs] == [m.config.run_dir for m in same.runs]
    assert not {m.config.run_dir for m in one.runs} & {m.config.run_dir for m in other.runs}


def test_columns_are_found_again_where_the_data_lies_elsewhere(tmp_path):
    path = table_file(tmp_path)
    (tmp_path / "run.yaml").write_text(f"name: small\nrun_dir: {tmp_path}/runs/small\ntask: {{name: nl2bash}}\n")
    one, other = (
        [m.config.run_dir for m in sweep.load_sweep(path, [f"task.folder={folder}"]).runs]
        for folder in ("/mnt/a", "/mnt/b")
    )
    assert one == other


def test_overrides_reach_the_runs_and_those_with_table_the_table(tmp_path):
    path = table_file(tmp_path, set={"train.lr": 0.002, "train.batch_size": 8})
    found = sweep.load_sweep(path, ["train.lr=0.003", "table.seeds=[5]", "table.only=[mine]"])
    assert [(m.column, m.seed, m.config.train.lr, m.config.train.batch_size) for m in found.runs] == [
        ("mine", 5, 0.003, 8)
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"full": "ful"}, "no column 'ful'"),
        ({"tilte": 1}, "unknown key 'tilte'; did you mean 'title'"),
        (
            {"columns": {"mine": {"label": "x", "set": {"train.rl": 1}}}, "full": "", "none": ""},
            r"columns.mine.set: train.rl",
        ),
        ({"run": "nowhere.yaml"}, "no such file"),
    ],
)
def test_a_mistake_is_named(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        sweep.load_sweep(table_file(tmp_path, **changes))


def test_a_key_inside_a_block_of_the_tables_own_can_be_given_on_the_command_line(tmp_path):
    path = table_file(tmp_path, set={"prompt": {"chat": "none", "query": "Q: {query}"}, "task.rows.train": 600})
    base = sweep.load_sweep(path, ["prompt.query='ask: {query}'", "task.rows={train: 50, dev: 5}"]).base
    assert (base.prompt.query, base.prompt.chat) == ("ask: {query}", "none")
    assert (base.task.rows.train, base.task.rows.dev) == (50, 5)


def test_settings_that_change_no_adapter_change_no_folder(tmp_path):
    path = table_file(tmp_path)
    folders = [
        [run.config.run_dir for run in sweep.load_sweep(path, overrides).runs] for overrides in (
            [], ["closed.confirmed=true", "closed.input_price=2", "train.max_failures=9", "train.checkpoint_every=1"],
            ["train.lr=0.5"],
        )
    ]
    assert folders[0] == folders[1] != folders[2]


def test_a_table_of_several_tasks_has_a_metric_for_each(tmp_path):
    path = table_file(tmp_path, run={"a": "run.yaml", "b": "run.yaml"}, metric={"a": "bleu"})
    assert sweep.load_sweep(path).metric == "bleu"
    with pytest.raises(ConfigError, match="metric names none for the task 'b'"):
        sweep.load_sweep(path, ["table.task=b"])


def test_another_seed_takes_over_the_preparation(tmp_path):
    found = sweep.load_sweep(table_file(tmp_path))
    first, second = found.runs_of("full")
    for name in ("queries", "rows", "templates", "phases"):
        (first.directory.root / name).mkdir(parents=True)
        (first.directory.root / name / "a.txt").write_text(name)
    first.directory.neighbours.write_text("n")
    second.directory.rows.mkdir(parents=True)  # of a copy that was cut short
    (second.directory.rows / "half.txt").write_text("")
    second.directory.neighbours.write_text("")
    sweep.share_preparation(found.runs, second)
    assert (second.directory.queries / "a.txt").exists() and not (second.directory.rows / "half.txt").exists()
    assert (
        second.directory.phases / "a.txt"
    ).read_text() == "phases" and second.directory.neighbours.read_text() == "n"
    sweep.share_preparation(found.runs, found.runs_of("none")[0])
    assert not RunDir(found.runs_of("none")[0].config.root).phases.exists()


def test_one_seed_of_every_column_comes_before_two_of_any(tmp_path):
    found = sweep.load_sweep(table_file(tmp_path))
    assert [r.seed for r in found.runs if r.trained] == [0, 0, 0, 1, 1, 1]


def test_the_table_says_value_interval_seeds_tokens_and_difference(done):
    head, *rows = table.table_rows(done, table.read_results(done), SPEEDS)
    text = {r[0]: dict(zip(head, r, strict=True)) for r in rows}
    mine, none = text["PromptIntern"], text["No template"]
    assert mine["Exact match (95%)"].startswith("76.2% (") and mine["by seed"] == "75.0%, 77.5%"
    assert mine["p by seed"] == "–" and none["p by seed"].split(", ")[0] == "<0.001"
    assert none["less than PromptIntern by"].startswith("+45.0 (")
    assert none["s, merged"] == "150 ms" and mine["s, merged"] == "–"


def test_the_table_says_how_many_answers_never_ended(done):
    path = done.runs_of("none")[1].directory.evaluation / "summary.json"
    changed = json.loads(path.read_text())
    changed["promptintern"]["cut_off"] = 0.05
    path.write_text(json.dumps(changed))
    head, *rows = table.table_rows(done, table.read_results(done), SPEEDS)
    assert {r[0]: r[head.index("cut off")] for r in rows} == {
        "Base": "0.0%", "Full prompt": "0.0%", "No template": "2.5%", "PromptIntern": "0.0%",
    }


def test_the_gap_recovered_is_said_where_there_is_one(done):
    sentence, numbers = table.recovered_gap(done, table.read_results(done))
    assert numbers["value"] == pytest.approx((30.5 - 12.5) / (36.5 - 12.5))
    assert sentence.startswith("Gap recovered: 75% (95%: ")


def test_without_a_gap_it_says_so(tmp_path):
    found = sweep.load_sweep(table_file(tmp_path))
    for run in found.runs:
        evaluated(run, 20)
    sentence, numbers = table.recovered_gap(found, table.read_results(found))
    assert sentence.startswith("No gap to recover at this size: Full prompt 50.0%") and numbers is None


def test_the_paper_stands_beside(tmp_path):
    found = sweep.load_sweep(table_file(tmp_path, paper={"columns": ["Template"], "rows": {"GPT-4": [[86.7, 1063]]}}))
    for run in found.runs:
        evaluated(run, 20)
    head, *rows = table.table_rows(found, table.read_results(found), {})
    assert head[-1] == "paper, GPT-4" and [r[-1] for r in rows] == ["–", "86.7 (1063 tokens)", "–", "–"]


def test_numbers_are_merged_into_the_results_in_place_of_older_ones(done, tmp_path):
    path = tmp_path / "results.json"
    made = table.result_entries(done, table.read_results(done), SPEEDS, "pi-ray table x")
    for _ in range(2):
        table.merge_results(path, made)
    table.merge_results(path, [{**made[0], "table": "8"}])
    kept = json.loads(path.read_text())
    assert len(kept) == len(made) + 1
    wanted = {
        "table", "column", "task", "model", "seed", "metric", "value", "low", "high", "test_rows", "input_tokens",
        "seconds_per_instance", "command",
    }
    assert all(wanted <= e.keys() for e in kept if e["metric"] != "gap_recovered")
    assert [e["value"] for e in kept if e["metric"] == "gap_recovered"] == [0.75]


def test_a_table_that_was_stopped_shows_what_there_is(tmp_path):
    found = sweep.load_sweep(table_file(tmp_path))
    evaluated(found.runs_of("none")[0], 10)
    head, *rows = table.table_rows(found, table.read_results(found), {})
    assert [r[0] for r in rows] == ["No template"]
    assert table.recovered_gap(found, table.read_results(found)) == ("", None)
    assert table.markdown_table([head, *rows]).count("\n") == 3
    assert [part.row_count for part in table.terminal_tables("t", [head, *rows])] == [1, 1], "no paper, so two parts"


@pytest.mark.parametrize("path", sorted((JOBS / "paper").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_tables_that_ship_load_and_their_paper_columns_are_there(path):
    found = sweep.load_sweep(path)
    paper = found.config.paper
    assert {c.paper for c in found.config.columns.values()} - {""} <= set(paper.columns)
    assert all(len(cells) == len(paper.columns) for cells in paper.rows.values())


def test_a_table_is_about_the_runs_first_metric_unless_it_names_another(tmp_path):
    path = table_file(tmp_path)
    assert sweep.load_sweep(path).metric == "exact_match"
    (tmp_path / "run.yaml").write_text("name: small\ntask: {metric: [{name: f1, label: words}, number]}\n")
    assert sweep.load_sweep(path).metric == "words"
    assert sweep.load_sweep(path, ["table.metric=number"]).metric == "number"
    with pytest.raises(ConfigError, match=r"metric 'bleu' is none of the run's task\.metric, which has words, number"):
        sweep.load_sweep(path, ["table.metric=bleu"])
    (tmp_path / "run.yaml").write_text("name: small\ntask: {metric: {name: python, file: s.py}}\n")
    with pytest.raises(ConfigError, match="name the number that it gives"):
        sweep.load_sweep(path)


def lengthened(texts):
    return [[f"{text} of five words or more" for text in of_seed] for of_seed in texts]


@pytest.mark.parametrize("metric", ["exact_match", "bleu"])
def test_turns_of_a_conversation_are_resampled_together(done, metric):
    mine, full = (next(c for c in table.read_results(done) if c.name == name) for name in ("mine", "full"))
    mine, full = (
        replace(c, metric=metric, answers=lengthened(c.answers), outputs=lengthened(c.outputs)) for c in (mine, full)
    )
    talks = [str(i // 10) for i in range(40)]  # the first turns are right, and so whole conversations
    apart, together = (replace(mine, clusters=clusters) for clusters in (None, talks))
    assert together.measured[0] == pytest.approx(apart.measured[0])
    assert together.measured[2] - together.measured[1] > 1.5 * (apart.measured[2] - apart.measured[1])
    p_apart, p_together = (
        float(table._difference_cells(column, replace(full, clusters=column.clusters))[1].split(", ")[0].strip("<"))
        for column in (apart, together)
    )
    assert p_together > 2 * p_apart  # 4 conversations instead of 40 rows
