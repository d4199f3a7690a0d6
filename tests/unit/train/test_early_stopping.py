"""Early stop: which score counts, when it stops, and that a run that dies in between ends the same."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from pi_ray.config import TrainConfig
from pi_ray.data import prepare
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.train.early_stopping import EarlyStop
from pi_ray.train.trainer import Trainer, train_worker
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings


def test_it_stops_after_so_many_scores_without_gain_and_keeps_the_state_of_the_best():
    early = EarlyStop(patience=2)
    scores = [(0.5, 1.0), (0.6, 0.9), (0.6, 0.9), (0.6, 0.95)]
    stops = [
        early.add_score(score, step, step + 1, lambda step=step: {"at": step}) for step, score in enumerate(scores)
    ]
    assert stops == [False, False, False, True]
    assert (early.state, early.step, early.adam_updates, early.best) == ({"at": 1}, 1, 2, (0.6, 0.9))
    again = EarlyStop(patience=2, **json.loads(json.dumps(early.facts())), state=early.state)
    assert replace(again, best=tuple(again.best)) == early


def test_of_equal_accuracies_the_lower_loss_is_a_gain():
    early = EarlyStop(patience=1)
    assert (
        not early.add_score((0.5, 1.0), 0, 1, dict) and not early.add_score((0.5, 0.9), 1, 2, dict) and early.step == 1
    )


def test_without_patience_nothing_is_kept():
    early = EarlyStop(patience=0)
    assert not early.add_score((0.5, 1.0), 0, 1, lambda: pytest.fail("no state is asked for")) and early.facts() == {}


def test_it_needs_scores():
    with pytest.raises(ValidationError, match=r"train\.dev_every"):
        TrainConfig(early_stop=2)


@pytest.fixture
def scored(monkeypatch):
    """Dev accuracies by update: phase 0 gains until update 3 and then no more, the others always. Under the last
    phase's prompt it is 0.9.
    """
    accuracy, score = {1: 0.1, 3: 0.3, 5: 0.2, 7: 0.2}, Trainer.evaluate

    def noted(self, update):
        self.now = update.step
        return score(self, update)

    monkeypatch.setattr(Trainer, "evaluate", noted)
    monkeypatch.setattr(
        Trainer, "evaluate_dev",
        lambda self, dev: (1.0, 0.9 if dev is self.dev else accuracy.get(self.now, 0.4 + self.now / 100)),
    )


@pytest.fixture
def config(tiny_model, tmp_path):
    """Nine updates a phase, scored after every second."""
    config = tiny_config(
        tiny_model, tmp_path / "run",
        **{"schedule.epochs": 3, "train.dev_every": 2, "train.early_stop": 2, "train.checkpoint_every": 3},
    )
    prepare_by_hand(config)
    return config


def test_a_phase_that_gains_no_more_ends_early_and_the_next_goes_on_from_its_best_adapter(config, scored, monkeypatch):
    end, kept = Trainer.end_phase, []

    def ends(self, update, *scores):
        best = self.early.state
        end(self, update, *scores)
        state = self.backend.state()
        kept.append(all(torch.equal(best[name], state[name]) for name in state) and self.adam_updates)

    monkeypatch.setattr(Trainer, "end_phase", ends)
    train_worker(settings(config))
    log = log_of(config)
    assert [e["step"] for e in log if "loss" in e] == [*range(8), *range(9, 27)]
    first, *others = [e for e in log if e.get("event") == "phase_end"]
    assert (first["step"], first["best_step"], first["early"], first["dev_accuracy"]) == (7, 3, True, 0.9)
    assert [(e["step"], e["best_step"], e["early"]) for e in others] == [(17, 17, False), (26, 26, False)]
    assert kept == [4, 13, 22], (
        "weights and moments are those of the best score, and Adam counts the updates that they have seen"
    )
    assert json.loads((RunDir(config.root).adapter(0) / "pi_ray.json").read_text())["dev_accuracy"] == 0.9, (
        "of phases those are compared that the last prompt gave"
    )


def test_a_run_that_dies_goes_on_to_the_same_adapters(config, scored, tmp_path, monkeypatch):
    train_worker(settings(config))
    strip = lambda c: [{k: v for k, v in e.items() if k not in ("seconds", "time")} for e in log_of(c)]  # noqa: E731
    # with a best state behind it; at a checkpoint that closes the phase which ended early
    for stop_at, every in ((7, 3), (10, 4)):
        again = config.replace(run_dir=str(tmp_path / f"again-{stop_at}"), **{"train.checkpoint_every": every})
        prepare_by_hand(again)
        dies_and_goes_on(again, stop_at, monkeypatch)
        assert [adapter_hash(again, phase) for phase in range(3)] == [adapter_hash(config, phase) for phase in range(3)]
        assert strip(again) == strip(config)


def test_a_phase_is_judged_under_its_own_prompt_and_its_adapter_compared_under_the_last_ones(
    tiny_model, tmp_path, monkeypatch
):
    config = tiny_config(tiny_model, tmp_path, **{"train.dev_every": 2, "train.early_stop": 9})
    prepare_by_hand(config)
    scores, asked = Trainer.evaluate_dev, []
    monkeypatch.setattr(Trainer, "evaluate_dev", lambda self, dev: asked.append(dev.rate) or scores(self, dev))
    train_worker(settings(config))
    assert asked == [1.0, 1.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0], (
        "of three updates after the second, after the third, and for the card"
    )


def test_dev_rows_are_prepared_with_each_phases_prompt_where_early_stop_asks_for_them(tiny_model, tmp_path):
    config = tiny_config(tiny_model, tmp_path)
    stops = config.replace(**{"train.dev_every": 2, "train.early_stop": 1})
    assert [p for p in prepare.plan_datasets(stops) if p not in prepare.plan_datasets(config)] == [
        ("dev-0", "dev", 1.0, 2), ("dev-1", "dev", 0.5, 1), ("dev-2", "dev", 0.0, 0),
    ]
    run = RunDir(config.root)
    with staged(run.rows, fingerprint="f", documents=3):
        pass
    for split in (["train"], ["train", "dev"]):
        with staged(run.documents, fingerprint="f") as made:
            for name in split:
                (made / f"{name}-0.50.parquet").touch()
        wanted = prepare.wanted_documents(config)
        assert prepare.has_documents(run, "f", wanted) and not prepare.has_documents(run, "g", wanted)
        assert prepare.has_documents(run, "f", prepare.wanted_documents(stops)) == ("dev" in split)
