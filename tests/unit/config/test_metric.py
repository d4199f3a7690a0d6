"""task.metric: its forms in a run file, mistakes that are named before anything starts, and what it changes."""

import pytest

from pi_ray.config import RunConfig, dump_config
from pi_ray.config.run_file import parse_run_file
from pi_ray.errors import ConfigError
from pi_ray.run.fingerprint import evaluate_fingerprint, learning_settings, prepare_fingerprint, train_fingerprint

JUDGE = {"name": "judge", "rubric": "good"}


def read(metric, *overrides, task="jsonl"):
    return parse_run_file(f"name: x\ntask:\n  name: {task}\n  metric: {metric}\n", "run.yaml", overrides)


@pytest.mark.parametrize("metric, entries", [
    ("f1", [{"name": "f1"}]), ("[number, f1]", [{"name": "number"}, {"name": "f1"}]),
    ("{name: number, tolerance: 0.1}", [{"name": "number", "tolerance": 0.1}]),
    ("[{name: regex, pattern: a}, {name: regex, pattern: b, label: second}]",
        [{"name": "regex", "pattern": "a"}, {"name": "regex", "label": "second", "pattern": "b"}]),
])  # fmt: skip
def test_a_metric_is_a_name_a_block_or_a_list_of_these(metric, entries):
    config = read(metric)
    assert config.task.model_dump(mode="json")["metric"] == entries
    assert parse_run_file(dump_config(config), "again") == config


def test_an_override_reaches_into_the_list():
    assert read("[{name: number}]", "task.metric.0.tolerance=0.5").task.metric[0].tolerance == 0.5
    assert [m.name for m in read("f1", "task.metric=[bleu,f1]").task.metric] == ["bleu", "f1"]


@pytest.mark.parametrize("metric, says", [
    ("f2", r"run\.yaml:4: task\.metric: no metric named 'f2'; there are: bleu, choice"),
    ("exactmatch", "did you mean 'exact_match'"),
    ("{name: number, tolerence: 1}", r"unknown key 'task\.metric\.tolerence'; did you mean 'task\.metric\.tolerance'"),
    ("[{name: number, tolerence: 1}]", r"did you mean 'task\.metric\.0\.tolerance'"),
    ("{name: f1, tolerance: 1}", "would have no effect: f1 does not read it"), ("regex", "regex needs pattern"),
    ("choice", "choice needs choices"), ("python", "python needs file"), ("judge", "judge needs rubric"),
    ("[f1, f1]", "'f1' twice; give one of them a label"), ("[{tolerance: 1}]", r"'task\.metric\.0\.name' is missing"),
    ("[{name: python, file: a}, {name: python, file: b}]", "two score files"),
    ("{name: number, tolerance: -1}", "greater than or equal to 0"), ("{name: f1, label: groups}", "means something"),
    ("{name: f1, label: 'F 1'}", "should match pattern"), ("{name: bleu, label: b}", "takes no label"),
    ("{name: tool_call, otherwise: judge}", "otherwise is one of"), ("3", "valid dictionary"),
    (f"{{name: regex, pattern: {'a' * 2001}}}", "at most 2,000"),
    ("{name: python, file: 's3://me:secret@bucket/score.py'}", "may not hold a user, a password"),
])  # fmt: skip
def test_a_mistake_is_named_with_its_line(metric, says):
    with pytest.raises(ConfigError, match=says):
        read(metric)


def test_a_task_that_brings_its_own_metric_takes_none():
    with pytest.raises(ConfigError, match="opsql brings its own"):
        read("f1", task="opsql")


def test_paths_start_from_the_run_files_folder(tmp_path):
    config = parse_run_file("name: x\ntask: {metric: {name: python, file: s.py}}", "run.yaml", folder=tmp_path)
    assert config.task.metric[0].file == str(tmp_path / "s.py") == config.task.inputs["metric.0.file"]


def made(metric, tmp_path, **changes):
    return RunConfig(name="x", run_dir=str(tmp_path)).replace(**{"task.metric": metric, **changes})


def test_rows_do_not_depend_on_it_training_on_having_one_and_the_evaluation_on_all(tmp_path):
    all_four = none, *_ = [made(metric, tmp_path) for metric in ([], ["f1"], ["f1", "number"], ["number", "f1"])]
    assert len({prepare_fingerprint(config, "t") for config in all_four}) == 1
    train = [train_fingerprint(config, "p") for config in all_four]
    assert train[0] != train[1] and len(set(train[1:])) == 1, "another one chooses among the same adapters"
    assert len({evaluate_fingerprint(config, []) for config in all_four}) == 4
    assert "metric" not in none.model_dump(mode="json")["task"]


def test_with_early_stop_training_depends_on_the_first(tmp_path):
    stops = {"train.dev_every": 2, "train.early_stop": 2}
    one, more, other = (made(metric, tmp_path, **stops) for metric in (["f1"], ["f1", "number"], ["number", "f1"]))
    assert train_fingerprint(one, "p") == train_fingerprint(more, "p") != train_fingerprint(other, "p")
    assert learning_settings(one)["task.metric, the first"]["name"] == "f1"


def test_a_files_content_counts_and_not_its_place_or_where_it_runs(tmp_path):
    paths = [tmp_path / name for name in ("a.py", "b.py", "c.py")]
    for path, text in zip(paths, ("x = 1", "x = 1", "x = 2"), strict=True):
        path.write_text(text)
    files = [{"name": "python", "file": str(path)} for path in paths]
    entries = [*files, {**files[0], "sandbox": True}]
    found = [evaluate_fingerprint(made([entry], tmp_path), []) for entry in entries]
    assert found[0] == found[1] == found[3] != found[2]


def test_a_judges_service_counts(tmp_path):
    one, other = (made([JUDGE], tmp_path, **{"closed.model": name}) for name in "ab")
    assert evaluate_fingerprint(one, []) != evaluate_fingerprint(other, [])


@pytest.mark.parametrize("metric, changes, name", [
    (["f1", "number"], {}, "f1"), ([JUDGE, "number"], {}, "number"), ([JUDGE], {}, None), ([], {}, None),
    (["f1"], {"schedule.phases": 1}, None), (["f1"], {"train.gist": 2, "schedule.rate_end": 0.5}, None),
    (["f1"], {"schedule.phases": 1, "train.dev_every": 2, "train.early_stop": 2}, "f1"),
    (["f1"], {"train.backend.zero_stage": 3}, None), (["f1"], {"train.backend.name": "openai"}, None),
])  # fmt: skip
def test_training_decides_by_the_first_that_costs_nothing_where_it_can_generate_and_has_a_choice(
    tmp_path, metric, changes, name
):
    found = made(metric, tmp_path, **changes).training_metric
    assert (found and found.name) == name
