"""Training through phases in one process on a tiny model: progress, resume, checkpoints, adapters."""

import io
import json
import shutil
import signal
from contextlib import redirect_stderr

import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from safetensors.torch import load_file, save_file

from pi_ray import cli
from pi_ray.cli.verbs import VERBS
from pi_ray.cluster.storage_sync import StorageSync
from pi_ray.config import ModelConfig, RunConfig, TrainConfig
from pi_ray.errors import AdapterError, ConfigError, TrainingError
from pi_ray.evaluate.adapter_answerer import AdapterAnswerer
from pi_ray.evaluate.columns import Column
from pi_ray.models import base_digest
from pi_ray.plan.estimate import tokens_of_updates
from pi_ray.run.artifact import digest, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import learning_settings, train_fingerprint
from pi_ray.run.object_storage import ObjectStorage
from pi_ray.schedule import Phase, plan_phases
from pi_ray.store.verify import verify_adapter
from pi_ray.train import checkpoint, launch
from pi_ray.train.launch import fingerprint_of, is_trained
from pi_ray.train.trainer import Trainer, train_worker
from pi_ray.train.updates import batch_rows, plan_updates
from tests.conftest import tiny
from tests.lora import rewrite
from tests.prepared import prepare_by_hand, tiny_config


def settings(config):
    return {"config": config.model_dump(mode="json"), "fingerprint": fingerprint_of(config), "device": "cpu"}


def adapter_hash(config, phase=2):
    return verify_artifact(RunDir(config.root).adapter(phase))["files"]["adapter_model.safetensors"]["sha256"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    config = tiny_config(tiny_model, tmp_path_factory.mktemp("trained"), **{"schedule.epochs": 3})
    prepare_by_hand(config)
    train_worker(settings(config))
    return config


def log_of(config):
    return [json.loads(line) for line in RunDir(config.root).train_log.read_text().splitlines()]


def test_loss_falls_and_every_phase_leaves_an_adapter(trained):
    steps = [e for e in log_of(trained) if "loss" in e]
    assert len(steps) == 27
    first, last = (sum(e["loss"] for e in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last < first - 0.1
    assert [e["phase"] for e in log_of(trained) if e.get("event") == "phase_end"] == [0, 1, 2]
    assert is_trained(trained)
    for phase in range(3):
        verify_artifact(RunDir(trained.root).adapter(phase))


def test_best_names_the_adapter_with_the_highest_dev_accuracy_and_of_equals_the_last(trained):
    found = [e["dev_accuracy"] for e in log_of(trained) if e.get("event") == "phase_end"]
    assert 0 < max(found) <= 1
    assert RunDir(trained.root).best.name == f"phase-{max(range(3), key=lambda i: (found[i], i))}"


def test_an_adapter_that_is_surer_of_what_it_cannot_know_is_not_worse(trained, tmp_path, monkeypatch):
    config = trained.replace(**{"run_dir": str(tmp_path), "schedule.epochs": 1})
    prepare_by_hand(config)
    scores = iter([(0.5, 0.6), (0.9, 0.8), (0.7, 0.7)])
    monkeypatch.setattr(Trainer, "evaluate_dev", lambda self, dev: next(scores))
    train_worker(settings(config))
    assert RunDir(tmp_path).best.name == "phase-1"


def test_a_finished_run_keeps_its_adapters_and_no_checkpoints(trained):
    assert not RunDir(trained.root).checkpoints.exists()


def test_an_adapter_remembers_its_prompt(trained):
    card = json.loads((RunDir(trained.root).adapter(2) / "pi_ray.json").read_text())
    assert card["prompt"] == trained.prompt.model_dump(mode="json")
    assert card["template"] == "" and card["base"] == trained.model.base
    assert card["full_prompt_tokens"] > 3 * card["query_prompt_tokens"] / 2


def dies_and_goes_on(config, stop_at, monkeypatch):
    """Interrupt training before update `stop_at`, then train again."""
    one = Trainer.train_step

    def dies(self, update):
        if update.step == stop_at:
            raise KeyboardInterrupt
        one(self, update)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_worker(settings(config))
    monkeypatch.setattr(Trainer, "train_step", one)
    train_worker(settings(config))


@pytest.mark.parametrize("stop_at", [3, 13, 20])
def test_a_run_that_dies_goes_on_to_the_same_adapter(trained, tiny_model, tmp_path, monkeypatch, stop_at):
    config = trained.replace(run_dir=str(tmp_path))
    prepare_by_hand(config)
    dies_and_goes_on(config, stop_at, monkeypatch)
    assert adapter_hash(config) == adapter_hash(trained)
    assert [e["step"] for e in log_of(config) if "loss" in e] == list(range(27))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, caplog):
    state = {"w": torch.arange(3.0)}
    for done in (2, 4):
        checkpoint.save_checkpoint(tmp_path, {"w": state["w"] + done}, done, "f", keep=3)
    victim = tmp_path / "step-00000004" / "state.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    found = checkpoint.newest_checkpoint(tmp_path, "f")
    assert found.name == "step-00000002"
    assert checkpoint.load_checkpoint(found)[0]["w"].tolist() == [2, 3, 4]
    assert (tmp_path / "step-00000004.corrupt").is_dir()
    assert "state.safetensors" in caplog.text and "sha256" in caplog.text


def test_checkpoints_of_another_configuration_are_refused(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"w": torch.zeros(1)}, 2, "before", keep=3)
    with pytest.raises(TrainingError, match="another configuration"):
        checkpoint.newest_checkpoint(tmp_path, "after")


def test_a_run_does_not_go_on_from_a_checkpoint_when_the_weights_of_its_base_were_replaced(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = tiny_config(base, tmp_path / "run")
    prepare_by_hand(config)
    before, facts = launch.fingerprint_of(config), learning_settings(config, base_digest(config.model))
    checkpoint.save_checkpoint(RunDir(config.root).checkpoints, {"a": torch.zeros(1)}, 2, before, 2, learned_from=facts)
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert launch.fingerprint_of(config) != before
    with pytest.raises(TrainingError, match=r"the base model's content was '[0-9a-f]{64}', now"):
        launch.train(config)


def test_the_card_knows_the_content_of_the_base_and_serving_refuses_another_one(
    trained, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(RunDir, "prepared_fingerprint", lambda self: "prepared")
    adapter = RunDir(trained.root).adapter(0)
    assert json.loads((adapter / "pi_ray.json").read_text())["base_content"] == base_digest(trained.model)
    base = tmp_path / tiny_model.name
    shutil.copytree(tiny_model, base)
    answerer, columns = AdapterAnswerer(trained), [Column("base", "", "", 0)]
    before = answerer.fingerprint(columns)
    moved = AdapterAnswerer(trained.replace(**{"model.base": str(base)}))
    weights = load_file(base / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert answerer.fingerprint(columns) == before != moved.fingerprint(columns)
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    rewrite(copied, "pi_ray.json", {**json.loads((adapter / "pi_ray.json").read_text()), "base": str(base)})
    with pytest.raises(AdapterError, match="other weights of its base model, which were replaced since"):
        verify_adapter(copied, ModelConfig(base=str(base)))


def test_a_loss_that_is_not_a_number_stops_training_and_says_where(tiny_model, tmp_path, monkeypatch):
    config = tiny_config(tiny_model, tmp_path)
    prepare_by_hand(config)
    monkeypatch.setattr(
        "pi_ray.train.trainer.sft_loss", lambda model, batch: torch.tensor(float("nan"), requires_grad=True)
    )
    with pytest.raises(TrainingError, match=r"update 0 \(phase 0\)"):
        train_worker(settings(config))
    assert not RunDir(tmp_path).checkpoints.exists()


def test_micro_batches_change_nothing_but_memory(trained, tmp_path):
    config = trained.replace(**{"run_dir": str(tmp_path), "train.micro_batch": 2, "schedule.epochs": 1})
    whole = config.replace(**{"run_dir": str(tmp_path / "whole"), "train.micro_batch": 0})
    for c in (config, whole):
        prepare_by_hand(c)
        train_worker(settings(c))
    assert [e["loss"] for e in log_of(config) if "loss" in e] == pytest.approx(
        [e["loss"] for e in log_of(whole) if "loss" in e], rel=1e-4
    )


def test_plain_batches_learn_the_same(trained, tmp_path):
    config = trained.replace(**{"run_dir": str(tmp_path), "train.share_prefix": False})
    prepare_by_hand(config)
    train_worker(settings(config))
    shared, plain = ([e for e in log_of(c) if "loss" in e] for c in (trained, config))
    assert [e["loss"] for e in plain[:5]] == pytest.approx([e["loss"] for e in shared[:5]], rel=1e-3)
    assert plain[0]["tokens"] >= plain[0]["plain_tokens"] > 2 * shared[0]["tokens"] / 2


def test_every_row_is_seen_once_per_epoch_whatever_the_batch():
    config = TrainConfig(workers=1, batch_size=5, seed=3)
    updates = plan_updates([20, 20], [Phase(1, 0, 2), Phase(0, 0, 1)], config)
    assert len(updates) == 12
    rows = [n for u in updates[:4] for n in batch_rows(u, 20, config)]
    assert sorted(rows) == list(range(20))
    assert rows != [n for u in updates[4:8] for n in batch_rows(u, 20, config)]


def test_phase_transitions_carry_or_rewarm_the_learning_rate():
    phases = [Phase(1, 0, 5), Phase(0, 0, 5)]
    carry = [u.lr for u in plan_updates([16, 16], phases, TrainConfig(workers=1, batch_size=4))]
    rewarm = [
        u.lr for u in plan_updates([16, 16], phases, TrainConfig(workers=1, batch_size=4, phase_transition="rewarm"))
    ]
    assert carry[20] < carry[15] and max(carry) == pytest.approx(5e-4)
    assert rewarm[20] > rewarm[19] and rewarm[:20] == rewarm[20:]


@pytest.mark.parametrize("transition, kept", [("carry", True), ("rewarm", True), ("reset", False)])
def test_a_phase_transition_keeps_or_resets_the_optimiser(trained, tmp_path, monkeypatch, transition, kept):
    config = trained.replace(**{"run_dir": str(tmp_path), "train.phase_transition": transition, "schedule.epochs": 1})
    prepare_by_hand(config)
    one, seen = Trainer.train_step, []

    def begins(self, update):
        if update.phase and not update.index:
            moments = [value for name, value in self.backend.state().items() if "/" in name]
            seen.append(
                (self.adam_updates, all(value.any() for value in moments), any(value.any() for value in moments))
            )
        one(self, update)

    monkeypatch.setattr(Trainer, "train_step", begins)
    train_worker(settings(config))
    assert seen == ([(3, True, True), (6, True, True)] if kept else [(0, False, False)] * 2) and is_trained(config)


def test_the_fingerprint_has_every_key_that_changes_what_is_learned_and_none_that_changes_rounding_alone():
    config = RunConfig(name="t")
    unlearned = {
        "max_failures", "keep_checkpoints", "checkpoint_every", "collective_timeout_s", "tracker", "attention",
        "workers", "micro_batch", "distill", "drills", "dev_every",
    }
    phases = [(p.rate, p.shots, p.epochs, p.steps) for p in plan_phases(config.schedule)]
    assert train_fingerprint(config, "p") == digest(
        ["p", config.train.model_dump(mode="json", exclude=unlearned), phases]
    )
    same = {
        "train.workers": 4, "train.micro_batch": 2, "train.collective_timeout_s": 9, "train.tracker": "tensorboard",
        "train.dev_every": 5, "train.attention": "sdpa",
    }
    assert train_fingerprint(config.replace(**same), "p") == train_fingerprint(config, "p")
    teaches = config.replace(**{"train.objective": "distill"})
    assert train_fingerprint(teaches, "p") != train_fingerprint(teaches.replace(**{"train.drills.mode": "off"}), "p")
    stops = config.replace(**{"train.dev_every": 5, "train.early_stop": 2})
    assert (
        len(
            {
                train_fingerprint(c, "p")
                for c in (config, stops, stops.replace(**{"train.dev_every": 6}), config.replace(**{"train.lr": 1e-3}))
            }
        )
        == 4
    )


@pytest.mark.parametrize("stop_at", [13, 20])
def test_a_run_that_resets_its_optimiser_at_phase_transitions_goes_on_to_the_same_adapter(
    tiny_model, tmp_path, monkeypatch, stop_at
):
    """Adam counts its updates anew after a phase transition, and a checkpoint has that count."""
    config = tiny_config(tiny_model, tmp_path / "quiet", **{"schedule.epochs": 3, "train.phase_transition": "reset"})
    again = config.replace(run_dir=str(tmp_path / "again"))
    for c in (config, again):
        prepare_by_hand(c)
    train_worker(settings(config))
    dies_and_goes_on(again, stop_at, monkeypatch)
    assert adapter_hash(again) == adapter_hash(config)


def test_a_base_with_dropout_of_its_own_goes_on_to_the_same_adapter(tmp_path, monkeypatch):
    config = tiny_config(tiny(tmp_path / "model", "Llama", attention_dropout=0.5), tmp_path / "quiet")
    again = config.replace(run_dir=str(tmp_path / "again"))
    for c in (config, again):
        prepare_by_hand(c)
    train_worker(settings(config))
    dies_and_goes_on(again, 5, monkeypatch)
    assert adapter_hash(again) == adapter_hash(config)


def test_a_model_with_an_attention_of_its_own_shares_by_its_cache_and_the_log_says_why(tmp_path):
    wanted = tiny_config(tiny(tmp_path / "model", "Bloom"), tmp_path / "wanted", **{"train.lr": 0.001})
    plain = wanted.replace(**{"run_dir": str(tmp_path / "plain"), "train.share_prefix": False})
    spared = wanted.replace(**{"run_dir": str(tmp_path / "spared"), "train.gradient_checkpointing": True})
    losses, said = {}, {}
    for config in (wanted, plain, spared):
        prepare_by_hand(config)
        train_worker(settings(config))
        losses[config.root.name] = [e["loss"] for e in log_of(config) if "loss" in e]
        said[config.root.name] = [e for e in log_of(config) if e.get("event") in ("plain_batches", "suffix_batches")]
    assert losses["wanted"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["spared"] == pytest.approx(losses["plain"], rel=1e-3)
    reason = "BloomForCausalLM has an attention of its own, which cannot be exchanged"
    for name in ("wanted", "spared"):
        assert [(e["event"], e["reason"]) for e in said[name]] == [("suffix_batches", reason)]
    assert not said["plain"]
    assert tokens_of_updates(wanted)[0] == tokens_of_updates(spared)[0] < tokens_of_updates(plain)[0]


def test_the_progress_of_shared_prefixes_counts_them_once(trained):
    assert tokens_of_updates(trained)[0] < tokens_of_updates(trained.replace(**{"train.share_prefix": False}))[0]


def test_half_precision_without_scaled_losses_is_refused(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path, **{"model.dtype": "float16"})
    prepare_by_hand(config)
    with pytest.raises(ConfigError, match=r"model\.dtype: float16 .* take bfloat16"):
        launch.train(config)


def test_the_choice_of_an_earlier_training_is_removed_before_training_begins_and_in_the_bucket_too(tmp_path):
    (tmp_path / "bucket").mkdir()
    objects = ObjectStorage("s3://bucket/run", SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem()), "run")
    before, now, later = (StorageSync(tmp_path / name, objects) for name in ("before", "now", "later"))
    run = RunDir(before.local)
    run.adapter(0).mkdir(parents=True)
    run.choose_best(0)
    before.push_changes()
    now.pull()
    assert RunDir(now.local).best.name == "phase-0"
    launch._forget_best(RunDir(now.local), now)
    later.pull()
    assert not RunDir(now.local).best_file.exists() and not RunDir(later.local).best_file.exists()


@pytest.mark.parametrize("ends", [SystemExit(0), KeyboardInterrupt()], ids=["by Ray", "by Python"])
@pytest.mark.parametrize("done, said", [(0, "no checkpoint was written yet"), (4, "the first 4 updates is kept")])
def test_an_interrupted_training_says_what_is_kept(tiny_model, tmp_path, monkeypatch, ends, done, said):
    config, mine = tiny_config(tiny_model, tmp_path), signal.getsignal(signal.SIGINT)
    prepare_by_hand(config)
    if done:
        checkpoint.save_checkpoint(RunDir(tmp_path).checkpoints, {"a": torch.zeros(1)}, done, fingerprint_of(config), 2)

    def fit(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray sets a handler, and leaves it
        raise ends

    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", fit)
    monkeypatch.setattr("pi_ray.cluster.placement.cluster_nodes", lambda: [{"CPU": 2}])
    monkeypatch.setitem(VERBS, "schema", VERBS["schema"]._replace(function=lambda args: launch.train(config)))
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        assert cli.main(["schema"]) == 130
    assert f"{said}" in stderr.getvalue() and "The same command goes on from there" in stderr.getvalue()
    assert signal.getsignal(signal.SIGINT) is mine
