"""The paper's tables at the paper's size: every file, task and model can be planned, and has the paper's settings."""

import json
import os
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pi_ray.config import ModelConfig, RunConfig
from pi_ray.errors import ConfigError, DataError
from pi_ray.experiments import dry
from pi_ray.experiments.plan_table import print_table_plan
from pi_ray.experiments.sweep import is_table, load_sweep
from pi_ray.models import load_tokenizer
from pi_ray.run.artifact import write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.schedule import plan_phases

ROOT = Path(__file__).parents[3]
FULL = ROOT / "jobs" / "paper" / "full"
TABLES = sorted(FULL.glob("table*.yaml"))
MODELS = ("llama-2-7b", "llama-2-13b", "mixtral-8x7b")
FOLDERS = {"nl2bash": "nl2bash", "nl2f-w": "wikisql", "mbpp": "mbpp"}
A2 = {"nl2bash": (12, 128, 10), "nl2f-w": (12, 128, 10), "mbpp": (6, 16, 5)}  # passes, batch, examples


def data(task):
    folder = Path(os.environ.get("PI_RAY_DATA") or ROOT.parent / "shared" / "data") / FOLDERS[task]
    assert folder.is_dir(), f"{folder} is missing: set PI_RAY_DATA to the folder of the data sets"
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, tiny_model):
    """Model -> a folder with its shape and some tokenizer, and no weights."""
    from transformers import LlamaConfig, MixtralConfig

    wide = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    made = {
        "llama-2-7b": LlamaConfig(),
        "llama-2-13b": LlamaConfig(**wide, num_attention_heads=40, num_key_value_heads=40),
        "mixtral-8x7b": MixtralConfig(sliding_window=None),
    }
    folder, tokenizer = tmp_path_factory.mktemp("shapes"), load_tokenizer(ModelConfig(base=str(tiny_model)))
    for name, config in made.items():
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def cases():
    for table in TABLES:
        tasks = load_sweep(table).config.run
        for task in tasks:
            yield pytest.param(table, task, id=f"{table.stem}-{task}")


def chosen(table, task, model):
    """Overrides that take a task and a model; gist tokens and ZeRO-3 do not go together."""
    gist = table.stem == "table7" and model == "mixtral-8x7b"
    only = ["table.only=[template-only,no-template,promptintern]"] if gist else []
    return [f"table.task={task}", f"table.model={model}", *only]


def test_there_are_all_eight():
    assert [t.stem for t in TABLES] == [f"table{i}" for i in range(1, 9)] and all(map(is_table, TABLES))
    assert not is_table(FULL / "mbpp.yaml")


@pytest.mark.parametrize("table, task", cases())
def test_every_column_has_the_papers_settings_and_the_same_passes(table, task):
    for model in MODELS:
        sweep = load_sweep(table, chosen(table, task, model))
        passes, batch, shots = A2[task]
        assert sweep.base.prompt.context == 4096 and sweep.base.evaluate.max_new_tokens == 1028
        assert sweep.base.compress.name == "llmlingua2" and sweep.base.train.lora.rank == 32
        assert sweep.config.paper.rows and {c.paper for c in sweep.config.columns.values()} - {""} <= set(
            sweep.config.paper.columns
        )
        for run in sweep.runs:
            phases = plan_phases(run.config.schedule)
            assert sum(p.epochs for p in phases) == passes, run.column
            assert run.config.train.batch_size == batch and run.config.train.checkpoint_every == 200
            assert max(p.shots for p in phases) <= shots
            assert run.config.train.phase_transition == "rewarm"
            assert f"/{model}/" in run.config.run_dir


def planned():
    """Each table on a model that each GPU holds and on one that is sharded; all tasks and models are among them."""
    for table in TABLES:
        task = next(iter(load_sweep(table).config.run))
        for model in ("llama-2-13b" if table.stem == "table4" else "llama-2-7b", "mixtral-8x7b"):
            yield pytest.param(table, task, model, id=f"{table.stem}-{task}-{model}")


@pytest.mark.parametrize("table, task, model", planned())
def test_every_column_is_planned_and_fits_on_one_node_and_on_two(table, task, model, shapes):
    sweep = load_sweep(table, [
        *chosen(table, task, model), f"model.base={shapes / model}", f"task.folder={data(task)}",
        "task.rows={train: 64, dev: 8, test: 8}",
    ])
    console = Console(width=200, file=StringIO())
    assert print_table_plan(sweep, console)
    text = console.file.getvalue()
    assert "all fit into GPUs of 80 GiB" in text and "NOT" not in text
    assert ("takes 2 GPUs" if model == "mixtral-8x7b" else "takes one GPU") in text
    assert all(sweep.config.columns[run.column].label[:20] in text for run in sweep.runs if run.trained)


def test_gist_tokens_and_zero_3_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"columns.gist.set: .*train.backend.zero_stage 3; take 2 or less"):
        load_sweep(FULL / "table7.yaml", ["table.model=mixtral-8x7b"])


@pytest.mark.parametrize("overrides, says", [
    (["table.model=llama-3"], "table.model: there is no 'llama-3'; there are llama-2-7b, llama-2-13b, mixtral-8x7b"),
    (["table.task=mbpp"], "table.task: there is no 'mbpp'; there are nl2bash"),
    (["schedule.epochs=1"], "schedule.epochs would have no effect on column promptintern-equal, which sets"),
    (["schedule.shots=3"], "schedule.shots would have no effect on column base, which sets schedule.shots itself"),
])
def test_what_a_table_would_not_heed_is_said(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_sweep(FULL / "table4.yaml", overrides)


def test_an_override_reaches_columns_that_do_not_hide_it():
    sweep = load_sweep(FULL / "table4.yaml", ["schedule.shots=3", "table.only=[promptintern]"])
    assert {max(p.shots for p in plan_phases(run.config.schedule)) for run in sweep.runs} == {3}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "model"


@pytest.fixture
def written_once(kept, monkeypatch):
    """All columns have one base, so that its tiny model is made once."""
    write = dry._write_tiny_model

    def once(config, folder):
        if not kept.exists():
            write(config, kept)
        shutil.copytree(kept, folder)

    monkeypatch.setattr(dry, "_write_tiny_model", once)


@pytest.mark.parametrize("table, task", cases())
def test_every_column_has_a_dry_run(table, task, shapes, written_once):
    """That its config in small is valid; `pi-ray table TABLE --dry` runs it, and tests/ray/test_dry.py a run file."""
    sweep = load_sweep(table, [f"table.task={task}", f"model.base={shapes / 'llama-2-7b'}"])
    for run in (run for run in sweep.runs if run.seed == 0):
        with dry.dry_config(run.config) as small_run:
            phases, small = plan_phases(run.config.schedule), plan_phases(small_run.schedule)
            assert [p.rate for p in small] == [p.rate for p in phases]
            assert all(p.epochs == 1 and p.shots <= 2 for p in small)
            assert small_run.train.gist == run.config.train.gist
            assert small_run.train.backend == run.config.train.backend
            assert (Path(small_run.model.base) / "model.safetensors").stat().st_size < 50e6
        assert not Path(small_run.model.base).exists()


def test_an_elastic_run_has_a_dry_run(shapes, written_once):
    settings = {"model.base": str(shapes / "llama-2-7b"), "train.workers": [4, 8]}
    with dry.dry_config(RunConfig(name="a").replace(**settings)) as small:
        assert (small.train.min_workers, small.train.workers) == (0, 2)


def test_a_dry_table_prepares_trains_and_evaluates_each_column_once(shapes, monkeypatch):
    done, scores = [], {"bleu": 1.0, "intervals": {"bleu": [0, 2]}}

    def take(step, config):
        done.append((step, config.run_dir))
        if step == "evaluate":
            write_atomic(RunDir(config.root).evaluation / "summary.json", json.dumps({"promptintern": scores}))

    for step in ("prepare", "train", "evaluate"):
        monkeypatch.setattr(dry.pipeline, step, lambda config, *rest, step=step: take(step, config))
    monkeypatch.setattr(dry, "trained_column", lambda config: "column")
    sweep = load_sweep(FULL / "table7.yaml", [
        f"model.base={shapes / 'llama-2-7b'}", "table.only=[promptintern,gist]",
    ])
    console = Console(width=200, file=StringIO())
    dry.dry_table(sweep, console)
    assert [step for step, _ in done] == ["prepare", "train", "evaluate"] * 2, "of three seeds the first"
    assert len({folder for _, folder in done}) == 2 and not any(Path(folder).exists() for _, folder in done)
    assert "every step of 2 columns works" in console.file.getvalue()
    scores = {"exact_match": 1.0, "intervals": {"exact_match": [0, 1]}}
    with pytest.raises(DataError, match="the table's metric is bleu, and its runs have exact_match; take one"):
        dry.dry_table(sweep, console)


def test_a_model_of_a_service_has_no_dry_run():
    config = RunConfig.model_validate({"name": "a", "train": {"backend": {"name": "openai"}}})
    with pytest.raises(ConfigError, match="would cost money"), dry.dry_config(config):
        pass
