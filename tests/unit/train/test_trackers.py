"""Trackers: which entries TensorBoard, W&B and MLflow get, from which worker, and which data stay on the machine."""

import json
import sys
from types import SimpleNamespace

import pytest

from pi_ray.config import RunConfig
from pi_ray.errors import MissingExtraError
from pi_ray.run.directory import RunDir
from pi_ray.train import trackers
from pi_ray.train.train_log import TrainLog, read_entries

UPDATE = {"loss": 1.5, "lr": 0.01, "epoch": 0, "tokens": 100, "plain_tokens": 400, "seconds": 0.5}
LOG = [
    {"event": "plain_batches", "reason": "because"},
    {"step": 0, "phase": 0, **UPDATE}, {"event": "dev", "phase": 0, "step": 0, "dev_loss": 1.2, "dev_accuracy": 0.5},
    {"step": 1, "phase": 1, **UPDATE},
    {"event": "phase_end", "phase": 1, "step": 1, "dev_loss": 1.0, "dev_accuracy": 0.75},
    {"event": "best", "phase": 1, "step": 1, "dev_accuracy": 0.75},
]  # fmt: skip


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def config_of(tmp_path, tracker):
    return RunConfig(name="t", run_dir=str(tmp_path / "run"), train={"tracker": tracker})


def tracked(config, done=0):
    run = RunDir(config.root)
    run.root.mkdir(exist_ok=True)
    log = TrainLog(run.train_log)
    log.follow(lambda: trackers.open_tracker(config, run, done))
    for entry in LOG:
        log.add(entry)
    log.close()


def test_numbers_go_by_update_and_phases_are_marked():
    said = []
    tracker = trackers.Tracker(
        lambda values, step: said.append((step, values)), lambda key, text, step: said.append((step, key, text)),
        lambda: said.append("closed"),
    )
    for entry in LOG:
        tracker.add(entry)
    tracker.close()
    assert said[0] == (0, "phase", "phase 0 begins at update 0") and said[3][1] == "phase"
    assert said[1] == (
        0,
        {
            "train/loss": 1.5, "train/lr": 0.01, "train/phase": 0, "train/tokens_per_s": 200.0,
            "train/tokens_saved": 0.75,
        },
    )
    assert said[2] == (0, {"dev/loss": 1.2, "dev/accuracy": 0.5}) and said[5] == (
        1, {"dev/loss": 1.0, "dev/accuracy": 0.75},
    )
    assert said[-2:] == [(1, "best", "phase 1, dev accuracy 0.7500"), "closed"]


def test_no_tracker_is_the_default(tmp_path):
    assert trackers.open_tracker(config_of(tmp_path, ""), RunDir(tmp_path), 0) is None


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    trackers.require_tracker("")
    with pytest.raises(MissingExtraError, match="pip install mlflow"):
        trackers.require_tracker("mlflow")


def test_tensorboard_files_stand_in_the_run_directory(tmp_path):
    pytest.importorskip("tensorboardX")
    config = config_of(tmp_path, "tensorboard")
    tracked(config)
    written = b"".join(p.read_bytes() for p in (config.root / "tensorboard").glob("events.*"))
    assert (
        b"train/loss" in written
        and b"dev/accuracy" in written
        and b"phase 1 begins at update 1" in written
        and b"train.lr" in written
    )


@pytest.fixture
def wandb(monkeypatch):
    calls = SimpleNamespace(init=[], logged=[], finished=0, summary={})
    run = SimpleNamespace(
        log=lambda values, step: calls.logged.append((step, values)), summary=calls.summary,
        finish=lambda: setattr(calls, "finished", calls.finished + 1),
    )
    module = SimpleNamespace(
        init=lambda **options: calls.init.append(options) or run, Settings=lambda **options: options,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_stays_offline_until_the_user_logs_in_and_a_restart_goes_on_with_the_same_run(
    tmp_path, wandb, monkeypatch
):
    config = config_of(tmp_path, "wandb")
    tracked(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret-key\n")
    tracked(config, done=1)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracked(config)
    assert [o["mode"] for o in wandb.init] == ["offline", "online", "disabled"]
    assert (
        len({o["id"] for o in wandb.init}) == 1
        and wandb.init[0]["resume"] == "allow"
        and wandb.init[0]["dir"] == str(config.root)
    )
    assert wandb.init[0]["config"]["train.lr"] == 0.0005 and wandb.finished == 3 and len(wandb.logged) == 12
    assert "secret-key" not in json.dumps([str(o) for o in wandb.init]) + (config.root / "tracker.json").read_text()


@pytest.fixture
def mlflow(monkeypatch):
    calls = SimpleNamespace(uri=[], runs=[], metrics=[], params={}, tags={}, ended=0)

    def start_run(**options):
        calls.runs.append(options)
        return SimpleNamespace(info=SimpleNamespace(run_id=options.get("run_id") or "run-1"))

    module = SimpleNamespace(
        set_tracking_uri=calls.uri.append, set_experiment=lambda name: None, start_run=start_run,
        log_params=calls.params.update, set_tag=calls.tags.__setitem__,
        log_metrics=lambda values, step: calls.metrics.append((step, values)),
        end_run=lambda: setattr(calls, "ended", calls.ended + 1), __spec__=SimpleNamespace(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_mlflow_writes_beside_the_run_unless_a_server_is_named_and_a_restart_goes_on_with_the_same_run(
    tmp_path, mlflow, monkeypatch
):
    config = config_of(tmp_path, "mlflow")
    tracked(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    tracked(config)
    assert mlflow.uri == [f"sqlite:///{(config.root / 'mlflow.db').resolve()}"]
    assert mlflow.runs == [{"run_name": "t"}, {"run_id": "run-1"}] and mlflow.params["train.lr"] == "0.0005"
    assert mlflow.metrics[0] == (
        0,
        {
            "train_loss": 1.5, "train_lr": 0.01, "train_phase": 0, "train_tokens_per_s": 200.0,
            "train_tokens_saved": 0.75,
        },
    )
    assert mlflow.tags["phase_1"] == "phase 1 begins at update 1" and mlflow.ended == 2


def test_only_the_first_worker_writes(tmp_path):
    log = TrainLog(tmp_path / "train.jsonl", writes=False)
    log.add({"step": 0})
    log.trim(0)
    assert not (tmp_path / "train.jsonl").exists()


def test_the_log_is_cut_back_to_what_is_done_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"event": "warning"}\n{"step": 0}\n{"step": 1}\n[3]\n{"step": 2}\n{"ste')
    TrainLog(path).trim(2)
    assert list(read_entries(path.read_bytes())) == [
        {"event": "warning"}, {"step": 0}, {"step": 1},
    ] and path.read_text().endswith("}\n")


@pytest.mark.parametrize("at", ["opened", "called", "closed"])
def test_a_tracker_that_fails_is_given_up_with_a_warning_and_training_goes_on(tmp_path, at):
    def fails(*_):
        raise ConnectionError("the server is gone")

    tracker = trackers.Tracker(
        fails if at == "called" else lambda *a: None, lambda *a: None, fails if at == "closed" else lambda: None
    )
    log = TrainLog(tmp_path / "train.jsonl")
    log.follow(fails if at == "opened" else lambda: tracker)
    for entry in LOG[:4]:
        log.add(entry)
    log.close()
    found = list(read_entries((tmp_path / "train.jsonl").read_bytes()))
    assert [e["text"] for e in found if e.get("event") == "warning"] == [
        "train.tracker gets no more, training goes on: ConnectionError: the server is gone"
    ]
    assert [e for e in found if e.get("event") != "warning"] == LOG[:4] and log.tracker is None
