"""Run files: defaults, overrides, and mistakes that are named with file, line, key and cure."""

import json

import pytest

from pi_ray import cli, config
from pi_ray.config import RunConfig, run_file
from pi_ray.errors import ConfigError
from pi_ray.experiments import sweep


@pytest.mark.parametrize("text, message", [
    ("name: a\ntrain:\n  lrr: 3\n", "t.yaml:3: unknown key 'train.lrr'; did you mean 'train.lr'?"),
    ("trian: {}\nname: a", "t.yaml:1: unknown key 'trian'; did you mean 'train'?"),
    ("name: a\ntask: {rows: {trian: 3}}", "t.yaml:2: unknown key 'task.rows.trian'; did you mean 'task.rows.train'?"),
    ("name: a\ntrain:\n  lr: fast", "t.yaml:3: train.lr: Input should be a valid number"),
    ("name: a\ntrain:\n  workers: 0", "t.yaml:3: train.workers: Input should be greater than or equal to 1"),
    ("name: ../a", "t.yaml:1: name: String should match pattern"),
    ("task: {}", "key 'name' is missing"),
    ("name: a\ntrain:\n  batch_size: 7", "t.yaml:3: train.batch_size 7 cannot be shared by train.workers 2"),
    ("# a demo\nname: a\nmodel: {base: gemma3-270m}", "t.yaml:3: model.base: gemma3-270m comes under terms of its own"),
    ("name: a\nschedule: {rate_start: 0.2, rate_end: 0.5}", "the template must shrink"),
    ("name: a\nprompt: {query: hello}", "prompt.query must contain {query}"),
    ("name: a\nserve: {min_replicas: 3}", "serve.min_replicas 3 is above"),
    (
        "name: a\nschedule: {name: list, shots: 3, list: [{rate: 1, shots: 0}]}",
        "t.yaml:2: schedule: schedule.shots would have no effect: "
        "with name: list each phase in schedule.list has its own; leave it out",
    ),
    (
        "name: a\nschedule: {name: list, epochs: [1], list: [{rate: 1, shots: 0}]}",
        "schedule.epochs would have no effect",
    ),
    (
        "name: a\nschedule: {name: constant, rate_end: 0.3}",
        "schedule.rate_end would have no effect: name: constant keeps rate_start throughout",
    ),
    ("name: a\ntrain: {backend: {name: ddp, zero_stage: 3}}", "train.backend.zero_stage would have no effect"),
    ("name: a\ntrain: {lora: {method: ia3, alpha: 3}}", "train.lora.alpha would have no effect"),
    ("name: a\ntrain: {share_prefix: false, attention: flex}", "train.attention would have no effect"),
    ("name: [", "not valid YAML"),
    (
        "name: a\ntrain: {lr: 1}\n\ntrain: {seed: 1}",
        "t.yaml:4: not valid YAML: key 'train' is there twice, in lines 2 and 4; keep one of them",
    ),
    ("name: a\ntrain:\n  seed: 1\n  lr: 1\n  seed: 2", "t.yaml:5: not valid YAML: key 'train.seed' is there twice"),
    ("name: a\nclosed: {base_url: 'https://x.com?api-key=abc'}", "without user, password or query"),
    (
        "name: a\ntrain: {backend: {name: deepsped}}",
        "t.yaml:2: train.backend: no backend named 'deepsped'; did you mean 'deepspeed'?",
    ),
    ("name: a\ntask: {train: ~nosuchuser/x}", "~nosuchuser/x: no such user, or no home, on this machine"),
    ("name: a\nmodel: {base: ~nosuchuser/x}", "~nosuchuser/x: no such user, or no home, on this machine"),
    ("- a", "expected labelled blocks"),
])
def test_a_mistake_is_named_with_its_place_and_cure(text, message):
    with pytest.raises(ConfigError) as error:
        run_file.parse_run_file(text, "t.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(("overrides", "message"), [
    (["train.distill.on_policy=0.2"], "no unlabelled ones for train.distill.on_policy"),
    (["train.distill.labelled=0.2"], "no others for train.distill.labelled"),
    (["task.name=opsql"], "not of opsql; leave task.train out"),
])
def test_what_needs_labelled_rows_is_refused_without_them(overrides, message):
    text = "name: x\ntask: {train: '', queries: q.jsonl}\ntrain: {objective: distill, distill: {teacher: base}}\n"
    run_file.parse_run_file(text, "run.yaml")
    with pytest.raises(ConfigError, match=message):
        run_file.parse_run_file(text, "run.yaml", overrides)


def test_overrides_reach_into_blocks_and_their_mistakes_name_the_command_line():
    assert run_file.parse_run_file("name: a", "t.yaml", ["train.lr=0.1", "task.rows={train: 5}"]).task.rows.train == 5
    with pytest.raises(ConfigError, match=r"command line: unknown key 'train\.lrr'"):
        run_file.parse_run_file("name: a", "t.yaml", ["train.lrr=0.1"])
    with pytest.raises(ConfigError, match=r"^command line: train\.batch_size 7 cannot be shared"):
        run_file.parse_run_file("name: a", "t.yaml", ["train.batch_size=7"])
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        run_file.parse_run_file("name: a", "t.yaml", ["train.lr"])


@pytest.mark.parametrize("text, overrides, message", [
    ("name: a\ntrain:\n  border: reset", [], "t.yaml:3: key 'train.border' is now called 'train.phase_transition'"),
    ("name: a\ntrain: {start: x}", [], "t.yaml:2: key 'train.start' is now called 'train.init_adapter'"),
    ("name: a", ["train.border=reset"], "command line: key 'train.border' is now called 'train.phase_transition'"),
])  # fmt: skip
def test_a_renamed_key_is_answered_with_its_new_name(text, overrides, message):
    with pytest.raises(ConfigError) as error:
        run_file.parse_run_file(text, "t.yaml", overrides)
    assert str(error.value) == message


def test_a_renamed_key_in_a_table_file_is_answered_with_its_line(tmp_path):
    (tmp_path / "run.yaml").write_text("name: a")
    columns = "columns:\n  mine:\n    label: Mine\n    set:\n      train.border: reset\n"
    (tmp_path / "table.yaml").write_text(f"table: '4'\ntitle: T\nrun: run.yaml\nmine: mine\n{columns}")
    with pytest.raises(ConfigError, match=r"table\.yaml:9: .*now called 'train\.phase_transition'"):
        sweep.load_sweep(tmp_path / "table.yaml")


def test_new_names_of_renamed_keys_are_keys():
    for old, new in run_file.RENAMED_KEYS.items():
        block = RunConfig.model_fields[new.split(".")[0]].annotation
        assert new.split(".")[1] in block.model_fields and old.split(".")[1] not in block.model_fields


def test_the_output_of_show_reads_back_to_the_same_config():
    first = run_file.parse_run_file("name: a\nschedule: {epochs: [1, 2, 3]}", "t.yaml")
    assert run_file.parse_run_file(config.dump_config(first), "shown") == first


@pytest.mark.parametrize("text", [
    "schedule: {name: list, list: [{rate: 1, shots: 0}]}",
    "schedule: {name: constant, rate_start: 0.5, rate_end: 0.5}",
    "train: {backend: {name: ddp, zero_stage: 2}}",
    "train: {lora: {method: ia3}}", "train: {share_prefix: false, attention: sdpa}",
])  # fmt: skip
def test_a_key_at_its_default_is_not_called_without_effect(text):
    first = run_file.parse_run_file(f"name: a\n{text}", "t.yaml")
    assert run_file.parse_run_file(config.dump_config(first), "shown") == first


def test_relative_paths_start_from_the_run_file(tmp_path):
    (tmp_path / "run.yaml").write_text("name: a\ntask: {train: rows.jsonl}")
    assert run_file.load_run_file(tmp_path / "run.yaml").task.train == str(tmp_path / "rows.jsonl")


def test_a_missing_run_file_says_how_to_get_one():
    with pytest.raises(ConfigError, match="pi-ray init"):
        run_file.load_run_file("nowhere/run.yaml")


@pytest.mark.parametrize("folder", ["afile", "afile/sub/run"])
def test_a_file_in_place_of_a_folder_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("x")
    with pytest.raises(ConfigError, match=rf"run_dir {tmp_path}/{folder}: {tmp_path}/afile is a file"):
        run_file.parse_run_file("name: a", "t.yaml", [f"run_dir={folder}"])
    with pytest.raises(ConfigError, match=r"afile/run\.yaml: no such file"):
        run_file.load_run_file("afile/run.yaml")


def test_a_run_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*args, **keys):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read \(Permission denied\)"):
        run_file.load_run_file(tmp_path / "run.yaml")


def test_the_schema_describes_every_block(capsys):
    assert cli.main(["schema"]) == 0
    blocks = json.loads(capsys.readouterr().out)["properties"]
    assert {"task", "model", "schedule", "train", "evaluate", "serve"} <= set(blocks)


def test_a_missing_argument_is_called_the_run_file_and_not_the_overrides(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan"])
    printed = capsys.readouterr().err
    assert "required: run.yaml" in printed and "section.key" not in printed.splitlines()[-1]


def test_a_typo_in_a_block_on_the_command_line_is_named_with_its_block():
    said = r"^command line: unknown key 'train\.drils'; did you mean 'train\.drills'\?$"
    with pytest.raises(ConfigError, match=said):
        run_file.parse_run_file("name: a\ntrain:\n  lr: 0.1\n", "run.yaml", ["train.drils.mode=off"])


@pytest.mark.parametrize("objective", ["distill", "mixed"])
def test_a_teacher_gets_no_examples_by_default_and_those_that_are_asked_for_by_the_query(objective):
    teaches = f"name: a\ntrain: {{objective: {objective}}}\n"
    config = run_file.parse_run_file(teaches, "a")
    assert (config.schedule.shots, config.retrieve.by) == (0, "query")
    asked = run_file.parse_run_file(teaches + "schedule: {shots: 1}\nretrieve: {by: answer}\n", "a")
    assert (asked.schedule.shots, asked.retrieve.by) == (1, "answer")
    labels = run_file.parse_run_file("name: a", "a")
    assert (labels.schedule.shots, labels.retrieve.by) == (2, "answer")


LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'{key}: *a{i - 1}' for key in 'bcdefghij')}}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize("text, overrides, said", [
    ("a: &a\n  - *a\n", [], "r.yaml: not valid YAML for a run: its blocks are nested without end"),
    ("name: &a {b: *a}\n", [], "r.yaml: not valid YAML for a run: its blocks are nested without end"),
    ("[" * 5000, [], "r.yaml: not valid YAML for a run: its blocks are nested without end"),
    (LAUGHS, [], "r.yaml: not valid YAML: aliases make more than 10000 keys of it"),
    ("name: a\ntask: {max_bad_rows: 2001-99-99}\n", [], "r.yaml: not valid YAML: month must be in 1..12"),
    ("? [a, {b: c}]\n: 1\n", [], "r.yaml: not valid YAML: found unhashable key"),
    ("name: a\x00", [], "r.yaml: not valid YAML"),
    ("name: a", ["train.lr=["], "'train.lr=[': not valid YAML"),
    ("name: a", ["train.lr=&a [*a]"], "command line: train.lr"),
    ("name: a", ["train.lr=" + "[" * 5000], "not valid YAML for a run: its blocks are nested without end"),
], ids=range(10))  # fmt: skip
def test_yaml_that_is_broken_or_hostile_is_an_error_and_no_traceback(text, overrides, said):
    with pytest.raises(ConfigError) as refused:
        run_file.parse_run_file(text, "r.yaml", overrides)
    assert said in str(refused.value)


def test_a_run_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "run.yaml").write_bytes("name: a\nprompt: {query: 'Größe {query}'}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml:2: not UTF-8 text; save the file as UTF-8"):
        run_file.load_run_file(tmp_path / "run.yaml")


@pytest.mark.parametrize("url", [
    "s3://AKIAKEY:se/cret@bucket/x", "s3://secret@bucket/x", "s3://bucket/x?secret_key=secret", "gs://b/x?token=secret",
    "s3://bucket/x?region=eu&X-Amz-Signature=secret",
])  # fmt: skip
@pytest.mark.parametrize("key", ["store", "task.train", "task.folder"])
def test_a_url_of_storage_with_a_secret_is_refused_without_being_shown(key, url):
    with pytest.raises(ConfigError, match=f"{key} may not hold a user, a password or a key") as refused:
        run_file.parse_run_file("name: a", "run.yaml", [f"{key}={url}"])
    assert "secret@" not in str(refused.value) and "=secret" not in str(refused.value)


@pytest.mark.parametrize("url", [
    "s3://bucket/keys/x?region=eu&endpoint_override=localhost:9000", "gs://anonymous@bucket/x", "file:///a/b@c",
    "hf://datasets/owner/name@main", "s3://bucket/token=3/x",
])  # fmt: skip
def test_a_url_of_storage_without_a_secret_is_taken(url):
    assert run_file.parse_run_file("name: a", "run.yaml", [f"store={url}"]).store == url


@pytest.mark.parametrize(("overrides", "message"), [
    ({"train.objective": "mixed"}, "learns its labelled turns"),
    ({"train.gist": 4, "schedule": {"name": "constant", "rate_end": 1.0, "shots": 0}}, "combined with train.gist yet"),
    ({"train.backend.name": "openai"}, "trains a model whose weights are here"),
    ({"schedule.shots": 2}, "has no examples yet"),
    ({"evaluate.shots": 1}, "has no examples yet"),
    ({"evaluate.knows": True}, "has no single queries"),
    ({"task.published": "old"}, "cannot follow a changed prompt yet"),
    ({"prompt.chat": "none"}, "prompt.chat none has no roles"),
    ({"prompt.query": "Q: {query}"}, "prompt.query would have no effect"),
    ({"prompt.conversation": False}, "leave it out"),
    ({"task.unseen": ["x"]}, "leave such rows out"),
])
def test_what_does_not_go_with_conversations_is_refused_in_a_sentence(overrides, message):
    config = RunConfig(name="a", task={"name": "conversations"})
    with pytest.raises(ValueError, match=message):
        config.replace(**overrides)


def test_conversations_have_no_examples_and_ask_about_no_units():
    config = RunConfig(name="a", task={"name": "conversations", "tools": "tools.json"})
    assert config.prompt.conversation and not config.schedule.shots and not config.evaluate.knows
    assert config.learns_all_turns("train") and not config.learns_all_turns("dev")
    assert not config.replace(**{"task.learn": "last"}).learns_all_turns("train")
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_keys_of_conversations_are_refused_elsewhere_and_change_no_other_run():
    with pytest.raises(ValueError, match="are for rows with messages"):
        RunConfig(name="a", task={"tools": "tools.json"})
    with pytest.raises(ValueError, match="set by task conversations alone"):
        RunConfig(name="a", prompt={"conversation": True})
    dumped = RunConfig(name="a").model_dump(mode="json")
    assert not {"tools", "learn"} & set(dumped["task"]) and "conversation" not in dumped["prompt"]
