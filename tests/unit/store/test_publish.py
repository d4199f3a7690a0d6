"""Publishing: what lands in the store, when a version is new, and what is refused."""

import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi_ray import cli
from pi_ray.config import ModelConfig, RunConfig, dump_config
from pi_ray.errors import AdapterError, CorruptArtifactError, DataError
from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE, Knowledge
from pi_ray.run.artifact import MANIFEST_HASH, digest, staged, temporary_path, verify_artifact, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.find_knowledge import find_knowledge
from pi_ray.store.prompt_guard import hash_example
from pi_ray.store.publish import publish_adapter
from tests.lora import card, rewrite, write_adapter

SUMMARY = {
    "base": {"exact_match": 0.0, "bleu": 1.2, "input_tokens": 20, "latency_s": 0.1},
    "base_full_prompt": {"exact_match": 0.05, "bleu": 9.5, "input_tokens": 1_190, "latency_s": 0.9},
    "plain": {"exact_match": 0.5, "bleu": 60.0, "input_tokens": 20, "latency_s": 0.1},
    "promptintern": {"exact_match": 0.875, "bleu": 91.25, "input_tokens": 20, "latency_s": 0.1},
}


def train(run, base, seed=1, phase=2, **facts):
    with staged(run.adapter(phase), fingerprint="f") as tmp:
        write_adapter(tmp, base, seed, facts=card(base, **facts))
    run.choose_best(phase)


@pytest.fixture
def config(tiny_model, tmp_path):
    return RunConfig(
        name="colours", run_dir=str(tmp_path / "run"), store=str(tmp_path / "store"),
        model=ModelConfig(base=str(tiny_model)),
    )


@pytest.fixture
def run(config, tiny_model):
    run = RunDir(config.root)
    train(run, tiny_model)
    return run


def test_a_published_adapter_is_what_was_trained_and_can_be_served(run, config, tiny_model):
    folder = publish_adapter(run, config)
    assert folder.name == "v0001"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "pi_ray.json",
    ]
    assert (folder / "adapter_model.safetensors").read_bytes() == (run.best / "adapter_model.safetensors").read_bytes()
    adapter = AdapterStore(config.store, config.model).open("colours")
    assert adapter.version == "v0001"
    assert adapter.card == card(tiny_model)


def test_the_machines_paths_stay_out_of_the_public_files(run, config, tiny_model):
    folder = publish_adapter(run, config)
    for file in ("README.md", "adapter_config.json"):
        assert str(tiny_model) not in (folder / file).read_text()


def test_the_same_adapter_is_not_published_twice_and_another_one_is_the_next_version(run, config, tiny_model):
    first = publish_adapter(run, config)
    assert publish_adapter(run, config) == first
    train(run, tiny_model, seed=2)
    second = publish_adapter(run, config)
    assert second.name == "v0002"
    train(run, tiny_model, seed=1)
    assert publish_adapter(run, config) == first
    assert json.loads((first.parent / "latest.json").read_text()) == {"version": "v0001"}
    assert publish_adapter(run, config, "other").parts[-2:] == ("other", "v0001")


def test_a_damaged_version_is_not_reused(run, config):
    first = publish_adapter(run, config)
    (first / "adapter_model.safetensors").write_bytes(b"x")
    assert publish_adapter(run, config).name == "v0002"


def test_what_a_killed_publication_has_left_is_removed_by_the_next_one(run, config, tiny_model):
    publish_adapter(run, config)
    left = temporary_path(Path(config.store) / "colours" / "v0002")
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    train(run, tiny_model, seed=2)
    assert publish_adapter(run, config).name == "v0002"
    assert sorted(p.name for p in left.parent.iterdir()) == [".lock", "latest.json", "v0001", "v0002"]


def test_two_publishers_do_not_take_the_same_version(config, tiny_model, tmp_path):
    runs = [RunDir(tmp_path / f"run{i}") for i in range(3)]
    for i, run in enumerate(runs):
        train(run, tiny_model, seed=i)
    made = []
    threads = [threading.Thread(target=lambda r=run: made.append(publish_adapter(r, config).name)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["v0001", "v0002", "v0003"]


def test_the_card_shows_scores_tokens_and_how_to_serve(run, config):
    write_atomic(run.evaluation / "summary.json", json.dumps(SUMMARY))
    text = (publish_adapter(run, config) / "README.md").read_text()
    for part in (
        "| this adapter | 87.5% | 91.2 | 20 | 0.10 |",
        "| base, full prompt | 5.0% | 9.5 | 1,190 | 0.90 |",
        "curl",
        "from openai import OpenAI",
        "| this adapter | 12 |",
        "## Licence",
    ):
        assert part in text


def test_the_card_shows_no_scores_of_another_adapter(run, config):
    summary = run.evaluation / "summary.json"
    own = json.loads((run.best / "manifest.json").read_bytes())["manifest_sha256"]
    write_atomic(summary, json.dumps(SUMMARY | {"adapter_sha256": "0" * 64}))
    assert "| this adapter | 87.5%" not in (publish_adapter(run, config, "other") / "README.md").read_text()
    write_atomic(summary, json.dumps(SUMMARY | {"adapter_sha256": own}))
    assert "| this adapter | 87.5%" in (publish_adapter(run, config, "own") / "README.md").read_text()


def test_the_card_says_so_when_nothing_was_evaluated(run, config):
    assert "Not evaluated before" in (publish_adapter(run, config) / "README.md").read_text()


def prepare(run, text, rates=(1.0, 0.5)):
    entries = [{"rate": r, "achieved": r, "text": " ".join(text.split()[: int(len(text.split()) * r)])} for r in rates]
    write_atomic(run.templates / "templates.json", json.dumps(entries))
    run.rows.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"id": ["1"], "query": ["red"], "answer": ["k4"], "group": [""]}), run.rows / "train.parquet"
    )


def test_the_prompt_is_published_with_the_adapter_so_that_serving_recognises_it(run, config, tiny_model):
    template = "Answer with one code for every colour that is asked for."
    bare = publish_adapter(run, config)
    prepare(run, template)
    assert publish_adapter(run, config) == bare  # trained with another template than the run has now
    train(
        run, tiny_model, full_template_sha256=digest(template),
        prompt={"chat": "chatml", "query": "Q: {query}", "example": "Q: {query} A: {answer}"},
    )
    folder = publish_adapter(run, config)
    assert (folder.name, publish_adapter(run, config)) == ("v0002", folder)
    prompt = json.loads((folder / "prompt.json").read_text())
    assert (prompt["template"], [f["rate"] for f in prompt["compressed"]], prompt["examples"]) == (
        template, [0.5], [hash_example("Q: red A: k4")],
    )
    guard = AdapterStore(config.store, config.model).open("colours").guard
    assert guard.inspect("", f"{template}\n\nExamples:\n\nQ: red A: k4\n\nQ: blue").text == "blue"
    assert "prompt.json" in (folder / "README.md").read_text() and "prompt.json" not in (bare / "README.md").read_text()


def test_values_before_each_training_query_are_published_as_values_of_the_prompt(run, config, tiny_model):
    template = "It is {time}. Answer with one code for every {colour} that is asked for, and never with two of them."
    prepare(run, template)
    pq.write_table(
        pa.table({"id": ["1"], "query": ["time: 9:00\n\nred"], "answer": ["k4"], "group": [""]}),
        run.rows / "train.parquet",
    )
    train(run, tiny_model, full_template_sha256=digest(template))
    folder = publish_adapter(run, config)
    assert json.loads((folder / "prompt.json").read_text())["values"] == ["time"]
    guard = AdapterStore(config.store, config.model).open("colours").guard
    assert guard.inspect(template.replace("{time}", "9:30"), "blue").text == "time: 9:30\n\nblue"


def test_publishing_without_a_known_prompt_is_a_warning(run, config, tiny_model, caplog):
    publish_adapter(run, config)
    assert "without prompt.json" in caplog.text
    caplog.clear()
    publish_adapter(run, config.replace(**{"serve.drift_guard": False}))
    prepare(run, "Answer with one code.")
    train(run, tiny_model, full_template_sha256=digest("Answer with one code."))
    publish_adapter(run, config)
    assert caplog.text == ""


def test_with_the_guard_off_the_template_is_not_published(run, config, tiny_model):
    prepare(run, "A secret template.")
    train(run, tiny_model, full_template_sha256=digest("A secret template."))
    folder = publish_adapter(run, config.replace(**{"serve.drift_guard": False}))
    assert "prompt.json" not in {p.name for p in folder.iterdir()}
    assert publish_adapter(run, config).name == "v0002"


@pytest.fixture
def asked(run):
    """The run's best adapter was asked about its prompt."""
    unit = {"section": "", "text": "red: k4", "kind": "item", "rows": 3, "queries": 2, "sure": 2}
    made = Knowledge(
        adapter_sha256=verify_artifact(run.best)[MANIFEST_HASH], units=[{**unit, "asked": 2, "agreed": 2}]
    )
    write_atomic(run.evaluation / KNOWLEDGE_FILE, made.model_dump_json())
    return made


def test_what_the_adapter_knows_is_published_with_it(run, config, asked):
    folder = publish_adapter(run, config)
    assert KNOWLEDGE_FILE in verify_artifact(folder)["files"]
    assert find_knowledge("colours", [f"store={config.store}"]) == asked


def test_pi_ray_knows_says_it_in_words(run, config, asked, capsys):
    publish_adapter(run, config)
    assert cli.main(["knows", "colours", f"store={config.store}"]) == 0
    assert "1 of 1" in capsys.readouterr().out
    assert cli.main(["knows", "colours@v0009", f"store={config.store}"]) == AdapterError.exit_code
    assert "no adapter 'colours@v0009'" in capsys.readouterr().err


def test_what_another_adapter_knew_is_not_published(run, config, asked, tiny_model):
    train(run, tiny_model, seed=2)
    assert not (publish_adapter(run, config) / KNOWLEDGE_FILE).exists()
    with pytest.raises(AdapterError, match=r"published without knows\.json"):
        find_knowledge("colours@v0001", [f"store={config.store}"])


@pytest.mark.parametrize("key", ["serve.knows", "serve.drift_guard"])
def test_a_key_keeps_what_the_adapter_knows_out_of_the_store(run, config, asked, key):
    assert not (publish_adapter(run, config.replace(**{key: False})) / KNOWLEDGE_FILE).exists()


def test_a_version_whose_knowledge_was_forged_is_refused(run, config, asked):
    folder = publish_adapter(run, config)
    rewrite(folder, KNOWLEDGE_FILE, {"format": 1, "adapter_sha256": "a", "units": [{"text": 7}]})
    with pytest.raises(AdapterError, match=r"knows\.json: units"):
        AdapterStore(config.store, config.model).open("colours")


def test_a_run_says_what_its_adapter_knows_once_it_is_evaluated(run, config, asked):
    write_atomic(run.config, dump_config(config))
    assert find_knowledge(str(config.root), []) == find_knowledge(str(run.config), []) == asked
    (run.evaluation / KNOWLEDGE_FILE).unlink()
    with pytest.raises(DataError, match="'pi-ray evaluate"):
        find_knowledge(str(config.root), [])


@pytest.mark.parametrize("name", ["..", "A", "a/b", ".x", "a" * 65, "a\n"])
def test_names_that_cannot_be_served_cannot_be_published(run, config, name):
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        publish_adapter(run, config, name)


def test_without_a_trained_adapter_the_error_names_the_command(config):
    with pytest.raises(AdapterError, match="pi-ray train"):
        publish_adapter(RunDir(config.root), config)


def test_a_changed_adapter_is_refused_and_the_store_stays_as_it_was(run, config):
    data = bytearray((run.best / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (run.best / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="sha256"):
        publish_adapter(run, config)
    assert AdapterStore(config.store).names() == []


def test_an_adapter_that_serving_would_refuse_is_not_published(run, config, tiny_model):
    train(run, tiny_model, max_answer_tokens=0)
    with pytest.raises(AdapterError, match="max_answer_tokens"):
        publish_adapter(run, config)
    folder = Path(config.store) / "colours"
    assert [p.name for p in folder.iterdir() if p.name != ".lock"] == []


def test_the_card_has_the_metrics_of_the_run(run, config):
    scores = {name: {"tool_call": 0.5, "bleu": 12.0, "input_tokens": 9, "latency_s": 0.1} for name in SUMMARY}
    write_atomic(run.evaluation / "summary.json", json.dumps({"metrics": ["tool_call", "bleu"], **scores}))
    card = (publish_adapter(run, config) / "README.md").read_text()
    assert "| | tool-call match | BLEU | input tokens | latency (s) |\n|---|---|---|---|---|\n" in card
    assert "| 50.0% | 12.0 | 9 | 0.10 |" in card
