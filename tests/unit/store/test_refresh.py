"""A refresh trains again from the published adapter, in a run directory of its own."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from pi_ray import cli
from pi_ray.cli import job
from pi_ray.config import RunConfig, dump_config
from pi_ray.config.run_file import load_run_file
from pi_ray.errors import AdapterError, TrainingError
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import train_fingerprint
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.run.phases import plain_finetuning_config
from pi_ray.store import refresh
from pi_ray.train import lora
from pi_ray.train.launch import fingerprint_of
from pi_ray.train.trainer import Trainer, train_worker
from tests.lora import put_in_store
from tests.prepared import prepare_by_hand, tiny_config

MONDAY, NEXT = datetime(2026, 3, 2), datetime(2026, 3, 9)


@pytest.fixture
def config(tmp_path, tiny_model):
    return RunConfig(
        name="shop", run_dir=str(tmp_path / "runs" / "shop"), store=str(tmp_path / "store"),
        model={"base": str(tiny_model)}, task={"name": "opsql"},
    )


def publish(config, *versions):
    for version in versions:
        put_in_store(Path(config.store), config.name, Path(config.model.base), version=version)


def test_a_refresh_starts_from_the_newest_version_in_a_directory_of_the_day(config):
    publish(config, "v0002", "v0009", "v0010")
    again = refresh.refresh_config(config, MONDAY)
    assert (
        again.run_dir == f"{config.run_dir}-2026-03-02" and again.train.init_adapter == f"{again.run_dir}/start/v0010"
    )
    refresh.copy_start_adapter(again)
    shutil.rmtree(Path(config.store) / "shop" / "v0010")
    refresh.copy_start_adapter(again)
    assert (Path(again.train.init_adapter) / "adapter_model.safetensors").is_file(), (
        "it is kept, whatever becomes of the store"
    )
    assert plain_finetuning_config(again).train.init_adapter == "", "the baseline knows nothing of earlier runs"


def test_a_refresh_that_was_cut_short_keeps_its_start_adapter_until_it_is_published(config):
    publish(config, "v0001")
    begun = refresh.refresh_config(config, MONDAY)
    refresh.copy_start_adapter(begun)
    publish(config, "v0002")
    assert refresh.refresh_config(config, NEXT) == begun, "a week later too"
    refresh.write_mark(begun, published=True)
    later = refresh.refresh_config(config, NEXT)
    assert (later.run_dir, later.train.init_adapter) == (
        f"{config.run_dir}-2026-03-09", f"{config.run_dir}-2026-03-09/start/v0002",
    )
    assert refresh.refresh_config(config, MONDAY).run_dir == f"{config.run_dir}-2026-03-02-2", (
        "the second of a day leaves the first alone"
    )


@pytest.mark.parametrize("change", [{"task.rows": {"train": 100}}, {"train.lr": 0.5}])
def test_with_other_rows_or_settings_a_new_refresh_begins(config, change):
    """The old one could not go on: its checkpoints were made with other rows."""
    publish(config, "v0001")
    refresh.copy_start_adapter(refresh.refresh_config(config, MONDAY))
    assert refresh.refresh_config(config.replace(**change), NEXT).run_dir == f"{config.run_dir}-2026-03-09"


def test_a_folder_that_is_no_refresh_is_left_alone(config):
    publish(config, "v0001")
    Path(f"{config.run_dir}-2026-03-02").mkdir(parents=True)
    assert refresh.refresh_config(config, MONDAY).run_dir == f"{config.run_dir}-2026-03-02-2"


def test_a_store_behind_a_url_is_read_like_a_folder(config):
    publish(config, "v0001")
    again = refresh.refresh_config(config.replace(store=f"file://{config.store}"), MONDAY)
    refresh.copy_start_adapter(again)
    start = Path(again.train.init_adapter)
    assert (
        start.name == "v0001"
        and (start / "adapter_model.safetensors").read_bytes()
        == (Path(config.store) / "shop" / "v0001" / "adapter_model.safetensors").read_bytes()
    )


def test_on_object_storage_another_cluster_goes_on_with_the_refresh(config, tmp_path, monkeypatch):
    """As a RayCronJob beside a bucket: each cluster is new, and only the bucket is left of the last one."""
    publish(config, "v0001")
    (tmp_path / "run.yaml").write_text(
        dump_config(config.replace(run_dir="runs/shop", **{"cluster.storage_path": f"file://{tmp_path}/bucket"}))
    )
    (tmp_path / "bucket").mkdir()
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "pod"))
    found = []

    def step(command):
        seen = load_run_file(Path(command[1]) / "run.yaml")
        found.append(
            (
                command[0], seen.root.name, seen.train.init_adapter.removeprefix(f"{seen.run_dir}/"),
                (seen.root / seen.train.init_adapter / "adapter_config.json").is_file(),
            )
        )
        return 1 if len(found) == 1 else 0

    monkeypatch.setattr(cli, "main", step)
    for code in (1, 0, 0):
        assert job.main("refresh", [str(tmp_path / "run.yaml")]) == code
        shutil.rmtree(tmp_path / "pod")
        publish(config, "v0002")
    first = f"shop-{datetime.now(UTC):%Y-%m-%d}"
    assert found == [
        ("run", first, "start/v0001", True), ("run", first, "start/v0001", True),
        ("run", f"{first}-2", "start/v0002", True),
    ]


def test_storage_that_does_not_answer_is_one_sentence_of_the_job(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(
        dump_config(config.replace(run_dir="runs/shop", **{"cluster.storage_path": f"file://{tmp_path}/bucket"}))
    )
    monkeypatch.setenv("PI_RAY_STORAGE", str(tmp_path / "pod"))
    monkeypatch.setattr(ObjectStorage, "list_folders", lambda self, pattern: (_ for _ in ()).throw(OSError("no route")))
    assert job.main("refresh", [str(tmp_path / "run.yaml")]) != 0
    assert "storage does not answer, or refuses (no route)" in capsys.readouterr().err


def test_a_damaged_adapter_is_no_start(config):
    publish(config, "v0001")
    (Path(config.store) / "shop" / "v0001" / "README.md").write_text("changed")
    with pytest.raises(AdapterError, match="refused"):
        refresh.refresh_config(config, MONDAY)


def test_without_a_published_adapter_the_error_says_what_to_do(config):
    with pytest.raises(AdapterError, match="'pi-ray run' makes and publishes the first"):
        refresh.refresh_config(config, MONDAY)


def test_the_start_adapter_is_part_of_the_training_fingerprint(config):
    assert "init_adapter:" not in dump_config(config), "a run that starts from a fresh adapter does not name the key"
    assert train_fingerprint(config, "p") != train_fingerprint(
        config.replace(**{"train.init_adapter": "/store/shop/v0001"}), "p"
    )


def settings(config):
    return {"config": config.model_dump(mode="json"), "fingerprint": fingerprint_of(config), "device": "cpu"}


@pytest.fixture(scope="module")
def first(tiny_model, tmp_path_factory):
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("first"), **{"schedule.epochs": 3})
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def again(first, tmp_path, **changes):
    config = first.replace(
        run_dir=str(tmp_path / "again"), **{"train.init_adapter": str(RunDir(first.root).adapter(2)), **changes}
    )
    prepare_by_hand(config)
    return config


def test_training_begins_with_the_adapters_weights_and_a_fresh_optimiser(first, tmp_path):
    worker = Trainer(RunConfig.model_validate(settings(again(first, tmp_path))["config"]), "f", "cpu", None)
    assert worker.resume() == 0
    saved = lora.load_init_adapter(RunDir(first.root).adapter(2), worker.backend.model, first.model.base)
    state = worker.backend.state()
    assert saved and all(torch.equal(state[name], value) for name, value in saved.items())
    assert not any(value.any() for name, value in state.items() if "/" in name)


def test_the_first_loss_is_lower_than_a_fresh_adapters(first, tmp_path):
    config = again(first, tmp_path, **{"schedule.epochs": 1})
    train_worker(settings(config))
    fresh, warm = (
        [json.loads(line) for line in RunDir(c.root).train_log.read_text().splitlines() if "loss" in line]
        for c in (first, config)
    )
    assert warm[0]["loss"] < fresh[0]["loss"]


def test_an_adapter_of_another_base_or_shape_is_refused(first, tmp_path):
    adapter = RunDir(first.root).adapter(2)
    with pytest.raises(TrainingError, match=r"does not fit train\.lora"):
        train_worker(settings(again(first, tmp_path, **{"train.lora.rank": first.train.lora.rank * 2})))
    worker = Trainer(RunConfig.model_validate(settings(again(first, tmp_path / "b"))["config"]), "f", "cpu", None)
    with pytest.raises(TrainingError, match=r"and model\.base is /another/model"):
        lora.load_init_adapter(adapter, worker.backend.model, "/another/model")
