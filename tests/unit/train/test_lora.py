"""Adapters: the layers that they train, each of peft's methods by name, and which of them may be published."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pi_ray.config import LoraConfig, ModelConfig, RunConfig
from pi_ray.errors import AdapterError, ConfigError, CorruptArtifactError, TrainingError
from pi_ray.evaluate.generation_workers import LoadedAdapters
from pi_ray.models import load_model
from pi_ray.run.directory import CARD_FILE, RunDir
from pi_ray.store.publish import publish_adapter
from pi_ray.store.verify import verify_adapter
from pi_ray.train import lora
from pi_ray.train.batches import PhaseDataset, plain_batch
from pi_ray.train.lora_linear import LoraLinear
from pi_ray.train.objectives import sft_loss
from pi_ray.train.trainer import train_worker
from tests.prepared import prepare_by_hand, tiny_config


def places(model, config):
    """Modules and parameters that get something trained, without layer numbers."""
    wrapped = lora.add_lora(load_model(ModelConfig(base=str(model))), config, seed=0)
    return {name.split("layers.")[1][2:].split(".lora_")[0] for name in lora.trainable_parameters(wrapped)}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}


def test_all_linear_is_every_linear_layer_of_a_dense_model_and_attention_alone_of_a_mixture_of_experts(
    tiny_model, tiny_mixtral
):
    assert places(tiny_model, LoraConfig(rank=2)) == ATTENTION | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert places(tiny_mixtral, LoraConfig(rank=2)) == ATTENTION
    assert places(tiny_mixtral, LoraConfig(rank=2, experts=True)) == ATTENTION | {
        "mlp.experts", "mlp.experts.base_layer",
    }
    assert places(tiny_mixtral, LoraConfig(rank=2, targets=("q_proj",))) == {"self_attn.q_proj"}


def test_experts_of_a_model_without_any_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="no fused experts"):
        lora.add_lora(load_model(ModelConfig(base=str(tiny_model))), LoraConfig(experts=True), seed=0)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """(method, family) -> the config of a run of 6 updates."""
    made = {}

    def run(family, **settings):
        key = json.dumps([family, settings])
        if key not in made:
            changes = {
                "train.lora": {**({} if settings.get("method") == "ia3" else {"rank": 4, "alpha": 8}), **settings}
            }
            made[key] = tiny_config(
                request.getfixturevalue(family), tmp_path_factory.mktemp("run"), **{"schedule.phases": 2, **changes}
            )
            prepare_by_hand(made[key])
            train_worker({"config": made[key].model_dump(mode="json"), "fingerprint": "f", "device": "cpu"})
        return made[key]

    return run


METHODS = [
    ("tiny_model", {"method": "rslora"}, ""), ("tiny_model", {"method": "pissa"}, ""), ("tiny_mixtral", {}, ""),
    ("tiny_model", {"targets": r".*\.(q|down)_proj"}, ""),
    ("tiny_model", {"method": "dora"}, "use_dora set"), ("tiny_model", {"method": "ia3"}, "peft_type is 'IA3'"),
    ("tiny_mixtral", {"experts": True}, ""),
]  # fmt: skip


@pytest.mark.parametrize("family, settings, refused", METHODS)
def test_an_adapter_of_each_method_does_on_the_untouched_base_what_it_did_in_training(
    trained, family, settings, refused
):
    config = trained(family, **settings)
    run, base = RunDir(config.root), load_model(config.model)
    folder, dev = str(run.adapter(1)), PhaseDataset(run.phase("dev"))
    batch = plain_batch(dev.prefix, dev.take(range(len(dev))))
    loss = lambda model: (sft_loss(model, batch) / dev.label_lengths.sum()).item()  # noqa: E731
    with torch.no_grad():
        bare = loss(base)
        loaded = LoadedAdapters(base, [folder])
        kinds = [type(module) for module in loaded.model.modules()]
        assert LoraLinear in kinds or settings.get("method") not in (None, "lora", "rslora", "pissa")
        loaded.activate(folder)
        found = loss(loaded.model)
        with loaded.merged():
            assert loss(loaded.model) == pytest.approx(found, abs=1e-5)
        assert loss(loaded.model) == found
        loaded.activate("")
        assert loss(loaded.model) == bare
    assert found == pytest.approx(json.loads((run.adapter(1) / CARD_FILE).read_text())["dev_loss"], abs=1e-5)
    assert abs(found - bare) > 1e-4


@pytest.mark.parametrize("family, settings, refused", METHODS)
def test_what_serving_cannot_compute_is_refused_at_publish_in_one_sentence(
    trained, tmp_path, family, settings, refused
):
    config = trained(family, **settings).replace(store=str(tmp_path))
    if not refused:
        assert verify_adapter(publish_adapter(RunDir(config.root), config), config.model)["base"] == config.model.base
        return
    with pytest.raises(AdapterError, match=f"{refused}; only plain LoRA and rsLoRA"):
        publish_adapter(RunDir(config.root), config)
    assert not list((tmp_path / "tiny").glob("v*"))


def test_pissa_is_saved_as_plain_lora_of_twice_the_rank(trained):
    folder = RunDir(trained("tiny_model", method="pissa").root).adapter(1)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (8, 16, True)
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name} == {8}


@pytest.mark.parametrize("settings", [{"method": "rslora", "alpha": 16}, {"method": "lora"}, {"method": "pissa"}])
def test_matrices_are_not_started_from_where_they_would_count_for_something_else(trained, settings):
    config = trained("tiny_model", method="rslora")
    folder, base = RunDir(config.root).adapter(1), config.model.base
    found = [
        lora.add_lora(load_model(config.model), c, seed=0)
        for c in (config.train.lora, LoraConfig(**{"rank": 4, "alpha": 8, **settings}))
    ]
    assert lora.load_init_adapter(folder, found[0], base).keys() == lora.trainable_parameters(found[1]).keys(), (
        "names and shapes alone would do"
    )
    with pytest.raises(TrainingError, match=r"does not fit train\.lora: take its method, rank, alpha"):
        lora.load_init_adapter(folder, found[1], base)


@pytest.mark.parametrize("settings, reason", [
    ({"train": {"lora": {"experts": True, "dropout": 0.1}}}, "without dropout"),
    ({"train": {"lora": {"experts": True, "method": "dora"}}}, "lora or rslora"),
    ({"train": {"lora": {"method": "pissa"}}, "model": {"quantize": "4bit"}}, "cannot go with model.quantize"),
    (
        {"train": {"lora": {"method": "pissa"}, "objective": "distill", "distill": {"teacher": "base"}}},
        "base model as teacher",
    ),
    ({"train": {"gpu": False}, "model": {"quantize": "4bit"}}, "needs GPUs"),
    ({"train": {"backend": {"zero_stage": 3}}, "model": {"quantize": "4bit"}}, "zero_stage 2 or less"),
])  # fmt: skip
def test_combinations_that_cannot_work_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        RunConfig.model_validate({"name": "a", **settings})


def test_a_pattern_names_the_layers_that_it_fits_and_the_adapter_holds_their_names(tiny_model):
    base = load_model(ModelConfig(base=str(tiny_model)))
    found = lora.peft_config(base, LoraConfig(targets=r".*layers\.1.*\.(q|v)_proj")).target_modules
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    with pytest.raises(ConfigError, match=r"fits no layer's name, such as 'model.layers.0.self_attn.q_proj'"):
        lora.peft_config(base, LoraConfig(targets="q_proj"))
    with pytest.raises(ConfigError, match="is no pattern"):
        lora.peft_config(base, LoraConfig(targets="(q_proj"))


def test_a_share_of_the_layers_is_taken_from_the_last_one_down(tiny_model, tiny_mixtral):
    def named(model, **settings):
        base = load_model(ModelConfig(base=str(model)))
        return lora.peft_config(base, LoraConfig(**settings)).target_modules

    assert named(tiny_model, layers=0.5) == {
        f"model.layers.1.{name}" for name in ATTENTION | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    }
    assert named(tiny_model, layers=0.4, targets=("q_proj",)) == {"model.layers.1.self_attn.q_proj"}
    assert len(named(tiny_model, layers=0.8, targets=("q_proj",))) == 2
    assert named(tiny_mixtral, layers=0.5) == {f"model.layers.1.{name}" for name in ATTENTION}
    with pytest.raises(ConfigError, match=r"the last 1 of 2 layers have none of \['model.layers.0"):
        named(tiny_model, layers=0.5, targets=r".*layers\.0\..*q_proj")
    with pytest.raises(ValueError, match="without experts"):
        LoraConfig(layers=0.5, experts=True)


def test_below_the_adapted_layers_nothing_is_kept_for_a_backward_pass(tiny_model):
    wrapped = lora.add_lora(load_model(ModelConfig(base=str(tiny_model))), LoraConfig(rank=2, layers=0.5), seed=0)
    lower, upper, _ = wrapped(torch.arange(8)[None], output_hidden_states=True).hidden_states[-3:]
    assert not lower.requires_grad and not upper.requires_grad, "what goes into the second layer and out of the first"
    assert wrapped(torch.arange(8)[None]).logits.requires_grad


def test_an_adapter_of_the_upper_layers_alone_is_published(trained, tmp_path):
    config = trained("tiny_model", layers=0.5)
    weights = load_file(RunDir(config.root).best / "adapter_model.safetensors")
    assert {name.split(".layers.")[1][0] for name in weights} == {"1"}
    assert publish_adapter(RunDir(config.root), config.replace(store=str(tmp_path))).name == "v0001"


@pytest.mark.parametrize("changes", [
    {"target_modules": "(a+)+b"}, {"target_modules": [["q_proj"]]}, {"exclude_modules": "(a+)+b"},
    {"feedforward_modules": ".*"}, {"target_modules": ["q_proj("]}, {"megatron_config": {"a": 1}},
    {"auto_mapping": {"parent_library": "os"}}, {"layer_replication": [[0, 1]]},
])  # fmt: skip
def test_an_adapter_of_a_run_directory_that_pi_ray_did_not_write_is_not_handed_to_peft(tiny_model, tmp_path, changes):
    base = load_model(ModelConfig(base=str(tiny_model)))
    lora.add_lora(base, LoraConfig(), seed=0).save_pretrained(tmp_path)
    base, path = load_model(ModelConfig(base=str(tiny_model))), tmp_path / "adapter_config.json"
    both = lora.load_adapter(lora.load_adapter(base, tmp_path, "one"), str(tmp_path), "two")
    assert set(both.peft_config) == {"one", "two"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CorruptArtifactError, match=f"{next(iter(changes))} in adapter_config.json is not pi-ray's"):
        lora.load_adapter(load_model(ModelConfig(base=str(tiny_model))), tmp_path)


def test_four_bits_on_a_cpu_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="needs a GPU"):
        load_model(ModelConfig(base=str(tiny_model), quantize="4bit"))


def test_settings_that_are_not_used_leave_no_trace_in_a_dump():
    plain_dump = RunConfig(name="a").model_dump(mode="json")
    assert (
        "quantize" not in plain_dump["model"]
        and not {"method", "experts"} & set(plain_dump["train"]["lora"])
        and set(plain_dump["train"]["backend"]) == {"name", "zero_stage"}
    )
    used = RunConfig(name="a").replace(**{"train.lora.method": "dora", "train.backend.offload_optimizer": True})
    assert RunConfig.model_validate(used.model_dump(mode="json")) == used
    assert used.train.lora.method == "dora" and used.train.backend.offload_optimizer


def test_weights_that_are_lent_to_a_model_leave_no_trace(tiny_model):
    model = lora.add_lora(load_model(ModelConfig(base=str(tiny_model))), LoraConfig(rank=2), seed=0)
    params = lora.trainable_parameters(model)
    before, places = {n: p.detach().clone() for n, p in params.items()}, [p.data_ptr() for p in params.values()]
    with pytest.raises(KeyboardInterrupt), lora.lent_weights(model, {n: p + 1 for n, p in before.items()}):
        assert all(torch.equal(p, before[n] + 1) for n, p in params.items())
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in params.items())
    assert [p.data_ptr() for p in params.values()] == places
