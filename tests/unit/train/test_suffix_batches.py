"""Rows that go on from their prefix's cache: the same losses and gradients as plain rows, in models with layers that
keep a state.
"""

import pytest
import torch

from pi_ray.config import LoraConfig, ModelConfig, TrainConfig
from pi_ray.errors import TrainingError
from pi_ray.models import load_model
from pi_ray.train import batch_logits, lora
from pi_ray.train.batches import plain_batch, suffix_batch
from pi_ray.train.gradient_cache import checkpoint_layers
from pi_ray.train.objectives import loss_and_correct, sft_loss
from pi_ray.train.packing import choose_packing
from pi_ray.train.trainer import train_worker
from tests.bench.families import FAMILIES, PREFIX, ROWS, gradients, tiny_model
from tests.conftest import tiny
from tests.prepared import prepare_by_hand, tiny_config
from tests.unit.train.test_deepspeed import train
from tests.unit.train.test_gist import KEPT
from tests.unit.train.test_train import adapter_hash, dies_and_goes_on, log_of, settings

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny-hybrid"), "Qwen3Next", **HYBRID)


def test_a_label_is_predicted_at_the_tokens_before_it():
    batch = suffix_batch([1, 2], [([5, 6, 7], [8, 9]), ([4], [3, ~2, 11]), ([10, 12], [13])])
    assert batch.inputs["prefix_ids"].tolist() == [[1, 2]]
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [4, 3, 2, 0], [10, 12, 0, 0]]
    assert batch.inputs["position_ids"].tolist() == [[2, 3, 4, 5]] * 3
    labels = batch.labels.view(3, 4).tolist()
    assert labels == [[-100, -100, 8, 9], [3, -100, 11, -100], [-100, 13, -100, -100]]
    assert (batch.tokens, batch.plain_tokens) == (2 + 12, 6 + 9)


def test_a_row_without_a_prompt_begins_with_the_last_token_of_the_prefix():
    batch = suffix_batch([1, 2], [([], [8, 9]), ([4], [3])])
    assert batch.inputs["prefix_ids"].tolist() == [[1]]
    assert batch.inputs["input_ids"].tolist() == [[2, 8], [2, 4]] and batch.labels.tolist() == [8, 9, -100, 3]


@pytest.mark.parametrize("family", ["Qwen3.5", "Falcon-H1", "LFM2", "gpt-oss", "Llama 3"])
@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no prefix"])
def test_losses_and_gradients_equal_those_of_plain_rows(family, prefix):
    model = lora.add_lora(tiny_model(*FAMILIES[family]), TrainConfig().lora, seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    (loss, expected), (shared_loss, found) = (gradients(model, pack, prefix) for pack in (plain_batch, suffix_batch))
    assert shared_loss == pytest.approx(loss, rel=1e-4)
    assert (found - expected).norm() / expected.norm() < 1e-3
    both = [loss_and_correct(model, pack(prefix, ROWS)) for pack in (plain_batch, suffix_batch)]
    assert both[0][1] == both[1][1]
    assert batch_logits.suffix_error(model, "cpu") == "" and model.training


def test_a_model_that_computes_something_else_behind_a_cache_says_so():
    mamba = lora.add_lora(tiny_model(*FAMILIES["Mamba"]), TrainConfig().lora, seed=0)
    assert "behind a cache it computes something else" in batch_logits.suffix_error(mamba, "cpu")
    rwkv = tiny_model("rwkv", {"attention_hidden_size": 32})
    assert "it cannot go on from a cache" in batch_logits.suffix_error(rwkv, "cpu")


def gradients_with_dropout(model, prefix):
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = sft_loss(model, suffix_batch(prefix, ROWS))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def losses(config):
    return [entry["loss"] for entry in log_of(config) if "loss" in entry]


@pytest.mark.parametrize("backend, world, checkpointing", [
    ({"name": "ddp"}, 1, False), ({"name": "deepspeed"}, 2, False), ({"name": "deepspeed", "zero_stage": 3}, 2, True),
])  # fmt: skip
def test_a_hybrid_trains_through_all_phases_as_with_plain_rows(hybrid, tmp_path, backend, world, checkpointing):
    runs = []
    for share in (True, False):
        changes = {"train.share_prefix": share, "train.micro_batch": 2, "train.batch_size": 8, "train.backend": backend}
        changes["train.gradient_checkpointing"] = checkpointing
        config = tiny_config(hybrid, tmp_path / str(share), **changes, **{"train.workers": world})
        prepare_by_hand(config)
        train(config)
        runs.append(config)
    (said,) = [entry for entry in log_of(runs[0]) if entry.get("event") == "suffix_batches"]
    assert "linear_attention" in said["reason"]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-3)
    assert sum(e["tokens"] for e in log_of(runs[0]) if "loss" in e) < sum(
        e["tokens"] for e in log_of(runs[1]) if "loss" in e
    )


def test_a_hybrid_that_was_killed_goes_on_bit_for_bit(hybrid, tmp_path, monkeypatch):
    config, other = (tiny_config(hybrid, tmp_path / name) for name in ("whole", "killed"))
    for each in (config, other):
        prepare_by_hand(each)
    train_worker(settings(config))
    dies_and_goes_on(other, 4, monkeypatch)
    assert adapter_hash(other) == adapter_hash(config) and losses(other) == losses(config)


@pytest.mark.parametrize("family", ["Qwen3.5", "Falcon-H1", "LFM2", "Granite 4", "gpt-oss", "Llama 3"])
@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no prefix"])
def test_checkpointed_layers_find_the_cache_again_that_they_found_first(family, prefix):
    model = lora.add_lora(tiny_model(*FAMILIES[family]), LoraConfig(dropout=0.2), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    loss, expected = gradients_with_dropout(model, prefix)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    undo = checkpoint_layers(model)
    again, found = gradients_with_dropout(model, prefix)
    assert again == pytest.approx(loss) and found.keys() == expected.keys() and expected
    assert all(torch.allclose(found[name], grad, rtol=1e-3, atol=1e-6) for name, grad in expected.items())
    undo()
    assert model.is_gradient_checkpointing


def test_layers_that_are_checkpointed_run_twice_and_keep_little(hybrid):
    model = load_model(ModelConfig(base=str(hybrid))).train()
    model.enable_input_require_grads()
    calls, kept = [], []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def count_kept():
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
            loss = sft_loss(model, suffix_batch([3] * 200, [([5] * 50, [6])] * 4))
        loss.backward()

    def note_size(tensor):
        kept[-1] += tensor.numel()
        return tensor

    count_kept()
    assert len(calls) == 2 * 2  # two layers, two passes
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint_layers(model)
    count_kept()
    assert len(calls) == 2 * 2 + 2 * 4 and kept[1] < 0.5 * kept[0]


def test_gradient_checkpointing_changes_no_loss_and_gists_are_refused(hybrid, tmp_path):
    plain, config = (
        tiny_config(hybrid, tmp_path / str(on), **{"train.gradient_checkpointing": on}) for on in (False, True)
    )
    for each in (plain, config):
        prepare_by_hand(each)
        train_worker(settings(each))
        assert [entry for entry in log_of(each) if entry.get("event") == "suffix_batches"]
    assert losses(config) == pytest.approx(losses(plain), rel=1e-4)
    gists = tiny_config(hybrid, tmp_path / "gist", **KEPT)
    prepare_by_hand(gists)
    with pytest.raises(TrainingError, match="cannot be trained with gist tokens"):
        train_worker(settings(gists))


def test_a_model_that_cannot_go_on_from_a_cache_keeps_transformers_own_checkpoints():
    model = lora.add_lora(tiny_model(*FAMILIES["Mamba"]), TrainConfig().lora, seed=0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pack, entry = choose_packing(model, TrainConfig(gradient_checkpointing=True), "cpu", 64, "it is recurrent")
    assert pack is plain_batch and "behind a cache it computes something else" in entry["reason"]
    assert model.is_gradient_checkpointing and "forward" not in vars(model.base_model.model.backbone.layers[0])


def test_the_loss_of_a_batch_is_a_sum():
    model = tiny_model(*FAMILIES["Qwen3.5"])
    with torch.no_grad():
        one, other, both = (sft_loss(model, suffix_batch(PREFIX, rows)) for rows in (ROWS[:1], ROWS[1:], ROWS))
    assert (one + other).item() == pytest.approx(both.item(), rel=1e-4)
