"""The golden curve: a tiny run has the losses of curve.json, and mistakes in training would move them."""

import json
from dataclasses import replace

import pytest

from pi_ray.train import lora, objectives, trainer, updates
from tests.golden.curve import FILE, curve

TOLERANCE = 1e-5  # nats a token
GOLDEN = json.loads(FILE.read_text())


def largest_difference(found):
    assert [len(found[key]) for key in ("loss", "dev_loss")] == [27, 3]
    return max(abs(new - old) for key in GOLDEN for new, old in zip(found[key], GOLDEN[key], strict=True))


def test_losses_are_those_of_the_golden_curve(tmp_path):
    found = curve(tmp_path)
    assert largest_difference(found) < TOLERANCE, (
        f"what is learned has changed: {found}; if that is meant, python -m tests.golden.curve writes the curve again"
    )
    assert sum(found["loss"][-5:]) < sum(found["loss"][:5])


def constant_learning_rate(monkeypatch):
    monkeypatch.setattr(updates, "learning_rate", lambda config, done, total: config.lr)


def learning_rate_one_update_late(monkeypatch):
    learning_rate = updates.learning_rate
    monkeypatch.setattr(
        updates, "learning_rate", lambda config, done, total: learning_rate(config, max(0, done - 1), total)
    )


def learning_rate_of_each_phase(monkeypatch):
    rewarm = {"phase_transition": "rewarm"}
    monkeypatch.setattr(
        trainer, "plan_updates",
        lambda rows, phases, config: updates.plan_updates(rows, phases, config.model_copy(update=rewarm)),
    )


def batches_with(monkeypatch, change):
    sft_loss = objectives.sft_loss
    monkeypatch.setattr(trainer, "sft_loss", lambda model, batch: sft_loss(model, change(batch)))


def first_label_token_masked(monkeypatch):
    """In one row of each batch alone: the smallest mistake of a label mask."""

    def mask(batch):
        labels = batch.labels.clone()
        labels[0] = -100
        return replace(batch, labels=labels)

    batches_with(monkeypatch, mask)


def labels_one_token_off(monkeypatch):
    batches_with(
        monkeypatch, lambda b: replace(b, inputs={**b.inputs, "logits_to_keep": b.inputs["logits_to_keep"] - 1})
    )


def lora_scale_halved(monkeypatch):
    peft_config = lora.peft_config
    monkeypatch.setattr(
        lora, "peft_config",
        lambda model, config: peft_config(model, config.model_copy(update={"alpha": config.alpha // 2})),
    )


def gradients_not_clipped(monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda params, limit: None)


def rows_in_another_order(monkeypatch):
    monkeypatch.setattr(
        "pi_ray.train.dataloader.batch_rows",
        lambda update, rows, config: updates.batch_rows(update, rows, config.model_copy(update={"seed": 1})),
    )


MISTAKES = [
    constant_learning_rate, learning_rate_one_update_late, learning_rate_of_each_phase, first_label_token_masked,
    labels_one_token_off, lora_scale_halved, gradients_not_clipped, rows_in_another_order,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_training_moves_a_loss_by_more_than_the_tolerance(mistake, monkeypatch, tmp_path):
    mistake(monkeypatch)
    assert largest_difference(curve(tmp_path)) > 10 * TOLERANCE
