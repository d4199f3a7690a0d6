"""Training under faults: killed, stopped and misled workers, damaged checkpoints, full disks, changed configurations.
Ray only where Ray is what is tested; a lost host is in tests/cluster.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch

from pi_ray.errors import CorruptArtifactError, StorageError, TrainingError
from pi_ray.run.artifact import MANIFEST, MANIFEST_HASH, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.store.publish import publish_adapter
from pi_ray.train import checkpoint, launch
from pi_ray.train.backends import DdpBackend
from pi_ray.train.trainer import Trainer, train_worker
from tests import dying, workers
from tests.disks import fill, leftovers
from tests.dying import Fault
from tests.prepared import prepare_by_hand, tiny_config
from tests.two_nodes import outside

pytestmark = pytest.mark.fault
UPDATES = 27  # three phases of nine


def settings(config):
    return {"config": config.model_dump(mode="json"), "fingerprint": launch.fingerprint_of(config), "device": "cpu"}


def adapters(config):
    return [
        verify_artifact(RunDir(config.root).adapter(i))["files"]["adapter_model.safetensors"]["sha256"]
        for i in range(3)
    ]


def log_of(config):
    return [json.loads(line) for line in RunDir(config.root).train_log.read_text().splitlines()]


def steps(config):
    return [e["step"] for e in log_of(config) if "loss" in e]


def work(given):
    train_worker(given)


def config_of(model, root, **changes):
    config = tiny_config(
        model, root, **{"schedule.epochs": 3, "train.batch_size": 4, "train.checkpoint_every": 4, **changes}
    )
    prepare_by_hand(config)
    return config


@pytest.fixture(scope="module")
def alone(tiny_model, tmp_path_factory):
    """A run of one worker, without faults."""
    config = config_of(tiny_model, tmp_path_factory.mktemp("alone"))
    train_worker(settings(config))
    return config


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory):
    """A run of two workers without faults and without Ray, which ends with the same bits."""
    config = config_of(tiny_model, tmp_path_factory.mktemp("pair"), **{"train.workers": 2})
    workers.run(2, work, settings(config))
    return config


def again(config, root, **changes):
    """The same run in another folder."""
    other = config.replace(run_dir=str(root), **changes)
    prepare_by_hand(other)
    return other


@contextmanager
def dies_before(step):
    """Train in this process, and interrupt the worker there."""
    one = Trainer.train_step

    def dies(self, update):
        if update.step == step:
            raise KeyboardInterrupt
        one(self, update)

    Trainer.train_step = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        Trainer.train_step = one


# F7: a loss that is no number


def poisoned(given, value, rank, at):
    """Train with the loss of one worker replaced from its forward pass number `at` on. Returns what it raised."""
    import torch.distributed as dist

    from pi_ray.train import trainer

    real, calls = trainer.sft_loss, [0]

    def loss(model, batch):
        calls[0] += 1
        return real(model, batch) * (value if dist.get_rank() == rank and calls[0] > at else 1.0)

    trainer.sft_loss = loss
    try:
        train_worker(given)
    except TrainingError as error:
        return str(error)
    finally:
        trainer.sft_loss = real


@pytest.mark.parametrize(
    "backend, value", [({"name": "ddp"}, float("nan")), ({"name": "deepspeed", "zero_stage": 2}, float("inf"))],
    ids=["ddp nan", "zero inf"],
)
def test_f7_all_workers_stop_in_the_update_in_which_one_has_no_number(tiny_model, tmp_path, backend, value):
    config = config_of(tiny_model, tmp_path, **{"train.workers": 2, "train.backend": backend})
    first, second = workers.run(2, poisoned, settings(config), value, 1, 6)
    assert first == second and "update 6 (phase 0)" in first and "train.lr" in first
    assert steps(config) == list(range(6)) and log_of(config)[-1]["step"] == 5
    found = checkpoint.newest_checkpoint(RunDir(config.root).checkpoints, launch.fingerprint_of(config))
    state, _, manifest = checkpoint.load_checkpoint(found)
    assert manifest["done"] == 4 and all(torch.isfinite(value).all() for value in state.values())


def test_f7_a_state_that_is_no_number_is_never_written(tiny_model, tmp_path, monkeypatch):
    """The loss was finite, the update was not."""
    config, step, calls = config_of(tiny_model, tmp_path), DdpBackend.step, []

    def breaks(self, lr):
        step(self, lr)
        calls.append(lr)
        if len(calls) == 8:
            next(iter(self.params.values())).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(DdpBackend, "step", breaks)
    with pytest.raises(TrainingError, match="no number"):
        train_worker(settings(config))
    assert [p.name for p in checkpoint.list_checkpoints(RunDir(config.root).checkpoints)] == ["step-00000004"]


# F5: damaged checkpoints


def two_checkpoints(folder):
    for done in (2, 4):
        checkpoint.save_checkpoint(folder, {"w": torch.arange(3.0) + done}, done, "f", keep=3, adam_updates=done)
    return folder / "step-00000004"


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("name", [checkpoint.STATE, MANIFEST])
def test_f5_a_damaged_checkpoint_is_set_aside_with_a_warning_and_the_older_one_used(tmp_path, name, how):
    newest, said = two_checkpoints(tmp_path), []
    damage(newest / name, how)
    found = checkpoint.newest_checkpoint(tmp_path, "f", warn=said.append)
    state, _, manifest = checkpoint.load_checkpoint(found)
    assert manifest["done"] == 2 and state["w"].tolist() == [2, 3, 4]
    assert (tmp_path / "step-00000004.corrupt").is_dir() and not newest.exists()
    assert len(said) == 1 and "step-00000004.corrupt" in said[0] and name in said[0]
    if how != "delete" and name == checkpoint.STATE:
        assert (
            said[0].count("sha256") == 1 and len([w for w in said[0].replace(";", "").split() if len(w) == 64]) == 2
        ), "both hashes are named"


def test_f5_no_single_flipped_bit_of_a_manifest_is_believed(tmp_path):
    newest = two_checkpoints(tmp_path)
    whole = (newest / MANIFEST).read_bytes()
    believed = {k: v for k, v in json.loads(whole).items() if k != MANIFEST_HASH}
    trusted = 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        (newest / MANIFEST).write_bytes(data)
        with suppress(CorruptArtifactError):
            found = verify_artifact(newest)
            assert {k: v for k, v in found.items() if k in believed} == believed, f"byte {at}"
            trusted += 1
    assert trusted < 40, (
        "only where the flip makes other white space, or hits the name under which the manifest's own hash stands"
    )


def test_f5_when_every_checkpoint_is_damaged_training_begins_again(tmp_path):
    two_checkpoints(tmp_path)
    for folder in checkpoint.list_checkpoints(tmp_path):
        damage(folder / checkpoint.STATE, "truncate")
    assert checkpoint.newest_checkpoint(tmp_path, "f") is None
    assert len(list(tmp_path.glob("*.corrupt"))) == 2


def test_f5_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_adapters_and_says_so(alone, tmp_path):
    config = again(alone, tmp_path)
    with dies_before(14):
        train_worker(settings(config))
    with open(RunDir(config.root).train_log, "a") as f:
        f.write('{"step": 14, "lo')  # what a crash leaves
    damage(tmp_path / "checkpoints" / "step-00000012" / checkpoint.STATE, "flip")
    train_worker(settings(config))
    assert adapters(config) == adapters(alone) and steps(config) == list(range(UPDATES))
    assert any(e.get("event") == "warning" and "step-00000012.corrupt" in e["text"] for e in log_of(config))


# F6: disks that are full, read-only or another's


def test_f6_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk):
    checkpoint.save_checkpoint(small_disk / "c", {"w": torch.ones(700_000)}, 2, "f", keep=3)
    with pytest.raises(StorageError, match=r"step-00000004.*No space left.*free some space"):
        checkpoint.save_checkpoint(small_disk / "c", {"w": torch.ones(1_500_000)}, 4, "f", keep=3)
    assert checkpoint.newest_checkpoint(small_disk / "c", "f").name == "step-00000002" and not leftovers(small_disk)


def test_f6_training_stops_at_a_full_disk_and_goes_on_when_there_is_space(alone, small_disk):
    config = again(alone, small_disk / "run")
    with dies_before(6):
        train_worker(settings(config))
    ballast = fill(small_disk, 24_000)
    with pytest.raises(StorageError, match="disk is full"):
        train_worker(settings(config))
    assert (
        not leftovers(small_disk)
        and checkpoint.newest_checkpoint(RunDir(config.root).checkpoints, launch.fingerprint_of(config)).name
        == "step-00000004"
    )
    ballast.unlink()
    train_worker(settings(config))
    assert adapters(config) == adapters(alone) and steps(config) == list(range(UPDATES))


def test_f6_an_adapter_that_does_not_fit_into_the_store_leaves_the_published_one(alone, tiny_model, small_disk):
    config = alone.replace(store=str(small_disk / "store"))
    first = publish_adapter(RunDir(config.root), config)
    other = alone.replace(run_dir=str(small_disk.parent / "other"), **{"train.seed": 1, "schedule.epochs": 1})
    prepare_by_hand(other)
    train_worker(settings(other))
    ballast = fill(small_disk, 16_000)
    with pytest.raises(StorageError, match="No space left"):
        publish_adapter(RunDir(other.root), config)
    assert json.loads((first.parent / "latest.json").read_text()) == {"version": "v0001"} and not leftovers(small_disk)
    verify_artifact(first)
    ballast.unlink()
    assert publish_adapter(RunDir(other.root), config).name == "v0002"


def test_f6_a_read_only_disk_is_named(small_disk):
    checkpoint.save_checkpoint(small_disk / "c", {"w": torch.ones(3)}, 2, "f", keep=3)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    try:
        with pytest.raises(StorageError, match=r"Read-only.*mount it for writing"):
            checkpoint.save_checkpoint(small_disk / "c", {"w": torch.ones(3)}, 4, "f", keep=3)
        assert checkpoint.newest_checkpoint(small_disk / "c", "f").name == "step-00000002"
    finally:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


@contextmanager
def another_user():
    """Have file permissions bind this process, as they bind a user who is not root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_f6_a_folder_of_another_owner_is_named(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "c", {"w": torch.ones(3)}, 2, "f", keep=3)
    (tmp_path / "c").chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    with another_user(), pytest.raises(StorageError, match=r"Permission denied.*may not write"):
        checkpoint.save_checkpoint(tmp_path / "c", {"w": torch.ones(3)}, 4, "f", keep=3)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000002"]


# F9: another configuration, another base, another number of workers


def test_f9_a_changed_configuration_is_refused_and_the_changes_are_named(alone, tiny_mixtral, tmp_path):
    config = again(alone, tmp_path)
    with dies_before(6):
        train_worker(settings(config))
    changed = config.replace(**{"train.lr": 0.02, "train.lora.rank": 8, "model.base": str(tiny_mixtral)})
    before = sorted(p.name for p in RunDir(tmp_path).checkpoints.iterdir())
    with pytest.raises(TrainingError, match="another configuration") as refused:
        train_worker({**settings(changed)})
    said = str(refused.value)
    assert (
        "train.lr was 0.01, now 0.02" in said
        and "train.lora.rank was 4, now 8" in said
        and f"now {str(tiny_mixtral)!r}" in said
    )
    assert "train.batch_size" not in said and sorted(p.name for p in RunDir(tmp_path).checkpoints.iterdir()) == before
    train_worker(settings(config))
    assert adapters(config) == adapters(alone)


def test_f9_another_number_of_workers_goes_on_with_the_same_rows_in_the_same_order(alone, tmp_path):
    config = again(alone, tmp_path)
    more = config.replace(**{"train.workers": 2, "train.micro_batch": 1, "train.max_failures": 9})
    assert (
        launch.fingerprint_of(more)
        == launch.fingerprint_of(config)
        != launch.fingerprint_of(config.replace(**{"train.seed": 1}))
    )
    with dies_before(14):
        train_worker(settings(config))
    workers.run(2, work, settings(more))
    assert steps(config) == list(range(UPDATES))
    losses, quiet = ([e["loss"] for e in log_of(c) if "loss" in e] for c in (config, alone))
    assert losses[:12] == quiet[:12] and losses == pytest.approx(quiet, rel=2e-3)
    assert launch.is_trained(more) and launch.is_trained(config)


# F1, F4, F8: killed and stopped workers under Ray


@pytest.fixture
def on_ray(ray_local, monkeypatch):
    monkeypatch.setattr(launch, "_ray_worker", dying.ray_worker)


@pytest.mark.ray
def test_f1_f4_f8_after_more_kills_than_max_failures_the_same_command_survives_others_and_a_worker_that_hangs(
    pair, tmp_path, on_ray
):
    """In a phase, in a checkpoint and between phases; it ends with the same adapters."""
    config = again(pair, tmp_path, **{"train.max_failures": 1, "train.collective_timeout_s": 15})
    dying.plant(
        tmp_path, Fault("update", 6, rank=1), Fault("update", 10, rank=0), Fault("checkpoint", 16, rank=0),
        Fault("phase", 1, rank=1), Fault("update", 22, rank=1, signal=signal.SIGSTOP),
    )
    with pytest.raises(TrainingError, match="the same command goes on") as stopped:
        launch.train(config)
    assert stopped.value.exit_code and dying.fired(tmp_path) == 2 and not launch.is_trained(config)
    found = checkpoint.newest_checkpoint(RunDir(tmp_path).checkpoints, launch.fingerprint_of(config))
    assert found.name == "step-00000008", "it is whole"
    launch.train(config.replace(**{"train.max_failures": 3}))
    assert dying.fired(tmp_path) == 5
    assert adapters(config) == adapters(pair) and steps(config) == list(range(UPDATES))
    assert len(dying.forwards(tmp_path)) <= UPDATES + 5 * 2 * 4, (
        "each fault costs two intervals between checkpoints at most"
    )
    assert not leftovers(tmp_path) and not RunDir(tmp_path).checkpoints.exists()


@pytest.mark.ray
def test_f1_killed_after_its_last_adapter_a_run_over_an_older_one_is_not_taken_for_finished(alone, tmp_path, on_ray):
    """The link to the older run's best adapter is still there when training with the new settings begins."""
    config = again(alone, tmp_path, **{"train.max_failures": 0, "schedule.epochs": 1})
    train_worker(settings(config.replace(**{"train.lr": 0.02})))
    assert RunDir(tmp_path).best.exists()
    dying.plant(tmp_path, Fault("phase", 2, rank=0))
    with pytest.raises(TrainingError, match="the same command goes on"):
        launch.train(config)
    assert dying.fired(tmp_path) == 1 and len(adapters(config)) == 3 and not launch.is_trained(config)
    launch.train(config)
    assert (
        launch.is_trained(config)
        and not RunDir(tmp_path).checkpoints.exists()
        and log_of(config)[-1]["event"] == "best"
    )


@pytest.mark.ray
def test_f7_what_another_try_would_only_repeat_is_not_tried_again(pair, tmp_path, ray_local):
    """With a missing base model, the worker's own error arrives after one start."""
    config = again(pair, tmp_path).replace(**{"model.base": "/no/such/model", "train.max_failures": 3})
    with pytest.raises(Exception, match="no such") as refused:
        launch.train(config)
    assert type(refused.value).__name__ == "ModelError"


# F2, F3: the driver and a node


PROGRAM = (
    "import sys, pathlib; from pi_ray.cluster import session; from pi_ray.config import RunConfig; from "
    "pi_ray.train.launch "
    "import train\n"
    "session.connect(); train(RunConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))"
)


@pytest.mark.ray
def test_f2_after_the_driver_was_killed_the_same_command_ends_with_the_same_adapters(pair, tmp_path, ray_local):
    """SIGKILL to the driver and its whole process group while the last phase runs; half of a snapshot of Ray's lies
    about as well.
    """
    config = again(pair, tmp_path / "run", **{"train.max_failures": 0})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    log = RunDir(config.root).train_log
    first = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json")], start_new_session=True, env=outside())
    deadline = time.monotonic() + 120
    while not (
        log.exists() and sum('"phase": 2' in line and '"loss"' in line for line in log.read_text().splitlines()) >= 2
    ):
        assert first.poll() is None and time.monotonic() < deadline, "the first run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not launch.is_trained(config)
    for name in {p.name for p in (config.root / "ray").iterdir()} | {"tiny"}:
        (config.root / "ray" / name).mkdir(exist_ok=True)
        (config.root / "ray" / name / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [')
    launch.train(config)
    assert adapters(config) == adapters(pair) and steps(config) == list(range(UPDATES))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"] and not (config.root / "ray").exists()
