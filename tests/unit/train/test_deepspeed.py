"""ZeRO with several processes against one without DeepSpeed, on random models of the real ones' structure: the same
losses, and shards of the base from the start.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from pi_ray.config import BackendConfig, RunConfig, TrainConfig
from pi_ray.models import load_model
from pi_ray.run.artifact import verify_artifact as verified
from pi_ray.run.directory import RunDir
from pi_ray.store import verify
from pi_ray.train import backends, checkpoint, lora
from pi_ray.train.trainer import Trainer, train_worker
from tests import workers
from tests.prepared import prepare_by_hand, tiny_config

PLAIN = {"train.workers": 1, "train.backend": {"name": "ddp"}}
OFFLOAD = {"offload_optimizer": True, "offload_params": True}
# Weights of so few elements stay whole on every worker: of a tiny model the norms, as of a real one by DeepSpeed's own
# bound of 100,000, and no matrix.
PERSISTENT = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: tiny matrices are slower with more, and other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def zero_of(stage, world, **own):
    return {"train.workers": world, "train.backend": {"name": "deepspeed", "zero_stage": stage, **own}}


def config_of(model, root, *changes, steps=5):
    """Two phases of `steps` updates each, prepared."""
    merged = {"schedule.phases": 2, "schedule.steps": steps, "train.checkpoint_every": 4}
    for change in changes:
        merged.update(change)
    config = tiny_config(model, root, **merged)
    prepare_by_hand(config)
    return config


def train(config, stop_at=0):
    """Train in this process, or in as many as the run has workers."""
    world = config.train.workers
    return train_one(config, stop_at) if world == 1 else workers.run(world, train_one, config, stop_at)


def train_one(config, stop_at=0, persistent=PERSISTENT):
    """Train as one worker, which ends before update `stop_at` if that is not 0."""
    one, settings = Trainer.train_step, backends.deepspeed_config

    def stops(self, update):
        if stop_at and update.step == stop_at:
            raise KeyboardInterrupt
        one(self, update)

    def sharded(*args):
        made = settings(*args)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
        return made

    Trainer.train_step, backends.deepspeed_config = stops, sharded
    try:
        train_worker({"config": config.model_dump(mode="json"), "fingerprint": "f", "device": "cpu"})
    except KeyboardInterrupt:
        pass
    finally:
        Trainer.train_step, backends.deepspeed_config = one, settings


def losses(config):
    entries = [json.loads(line) for line in RunDir(config.root).train_log.read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == list(range(len([e for e in entries if "loss" in e])))
    return [e.get("loss", e.get("dev_loss")) for e in entries if "loss" in e or "dev_loss" in e]


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_mixtral, tmp_path_factory):
    """(model, changes) -> losses of one process without DeepSpeed, made once."""
    made = {}

    def losses_of(model, **changes):
        key = (model, json.dumps(changes))
        if key not in made:
            config = config_of(model, tmp_path_factory.mktemp("alone"), PLAIN, changes)
            train(config)
            made[key] = losses(config)
            assert len(made[key]) == 12 and made[key][-1] < made[key][0] - 0.1
        return made[key]

    return losses_of


EXPERTS = {"train.lora.experts": True}
CHECKPOINTING = {"train.gradient_checkpointing": True, "train.micro_batch": 1}


@pytest.mark.parametrize("family, setting, changes", [
    ("tiny_mixtral", zero_of(3, 2), {}), ("tiny_mixtral", zero_of(3, 2), EXPERTS),
    ("tiny_mixtral", zero_of(3, 2), CHECKPOINTING), ("tiny_mixtral", zero_of(2, 2), {}),
    ("tiny_model", zero_of(3, 2, **OFFLOAD), {}), ("tiny_model", zero_of(1, 2), CHECKPOINTING),
    ("tiny_model", zero_of(0, 2), {}),
    ("tiny_model", zero_of(2, 2, offload_optimizer=True), {"train.share_prefix": False}),
], ids=["mixtral, stage 3, 2 workers", "mixtral with experts, stage 3, 2 workers",
        "mixtral with checkpointing, stage 3, 2 workers", "mixtral, stage 2, 2 workers",
        "llama offloaded, stage 3, 2 workers", "llama with checkpointing, stage 1, 2 workers",
        "llama, stage 0, 2 workers",
        "llama in plain batches, offloaded, stage 2, 2 workers"])  # fmt: skip
def test_ten_updates_have_the_losses_of_one_process_without_deepspeed(
    request, alone, tmp_path, family, setting, changes
):
    model = request.getfixturevalue(family)
    config = config_of(model, tmp_path, setting, changes)
    train(config)
    assert losses(config) == pytest.approx(alone(model, **(EXPERTS if changes == EXPERTS else {})), abs=1e-4)
    folder = RunDir(config.root).adapter(1)
    tensors = load_file(folder / verify.WEIGHTS_FILE).values()
    assert all(t.dtype == torch.float32 and t.numel() for t in tensors), "saved whole, not a worker's shard"
    verify.verify_adapter(folder, config.model)


@pytest.mark.parametrize("family, setting", [
    ("tiny_mixtral", zero_of(3, 4)), ("tiny_model", {"train.workers": 4, "train.backend": {"name": "ddp"}}),
], ids=["mixtral, stage 3", "llama, data parallelism"])  # fmt: skip
def test_so_many_workers_as_are_left_share_rows_that_do_not_divide(request, alone, tmp_path, family, setting):
    """Four rows of an update on three workers, one row a pass: two of them have none in the second."""
    model = request.getfixturevalue(family)
    config = config_of(model, tmp_path, setting, {"train.min_workers": 2, "train.micro_batch": 1})
    workers.run(3, train_one, config)
    assert losses(config) == pytest.approx(alone(model), abs=1e-4)


@pytest.mark.parametrize("family, change, within", [
    ("tiny_mixtral", {"model.dtype": "bfloat16"}, 0.02), ("tiny_model", {"train.lora.method": "dora"}, 1e-4),
    ("tiny_model", {"train.lora.method": "pissa"}, 1e-4),
], ids=["bfloat16", "dora", "pissa"])  # fmt: skip
def test_bfloat16_and_methods_that_read_the_base_weights_train_in_shards_too(request, tmp_path, family, change, within):
    model = request.getfixturevalue(family)
    runs = [
        config_of(model, tmp_path / name, setting, change, steps=2)
        for name, setting in (("plain", PLAIN), ("sharded", zero_of(3, 2)))
    ]
    for config in runs:
        train(config)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=within)


@pytest.mark.parametrize(
    "first, then",
    [
        (PLAIN, zero_of(3, 2)), (zero_of(3, 2, offload_optimizer=True), zero_of(2, 2, offload_optimizer=True)),
        (zero_of(3, 2), PLAIN),
    ],
    ids=["1 to 2 workers", "stage 3 to 2, offloaded", "2 workers to 1"],
)
def test_a_run_goes_on_with_another_number_of_workers_and_another_stage(tiny_mixtral, tmp_path, first, then):
    whole = config_of(tiny_mixtral, tmp_path / "whole", PLAIN, steps=3)
    train(whole)
    config = config_of(tiny_mixtral, tmp_path / "run", first, steps=3)
    train(config, stop_at=5)
    assert [p.name for p in RunDir(config.root).checkpoints.iterdir()] == ["step-00000004"]
    train(config.replace(**then))
    assert losses(config) == pytest.approx(losses(whole), abs=1e-4)


def quietly_and_dying(quiet, config):
    """Train as one worker of both runs, one after the other, which costs one start. Returns how many updates the second
    went on from.
    """
    train_one(quiet)
    train_one(config, stop_at=5)
    done = checkpoint.load_checkpoint(checkpoint.newest_checkpoint(RunDir(config.root).checkpoints, "f"))[-1]["done"]
    train_one(config)
    return done


def adapters(config):
    return [verified(RunDir(config.root).adapter(i))["files"][verify.WEIGHTS_FILE]["sha256"] for i in range(2)]


@pytest.mark.parametrize(
    "setting, transition", [(zero_of(2, 2), "carry"), (zero_of(3, 2), "carry"), (zero_of(2, 2), "reset")],
    ids=["stage 2", "stage 3", "stage 2, optimiser reset at phase transitions"],
)
def test_a_run_that_dies_goes_on_to_the_same_bits(tiny_model, tmp_path, setting, transition):
    quiet, config = (
        config_of(tiny_model, tmp_path / name, setting, {"train.phase_transition": transition}, steps=3)
        for name in ("quiet", "dies")
    )
    assert set(workers.run(2, quietly_and_dying, quiet, config)) == {4}
    assert adapters(config) == adapters(quiet) and losses(config) == losses(quiet)


def share_held(config):
    """The share of the base's weights that this worker holds once it is loaded."""
    from pi_ray.train.backends import DeepSpeedBackend

    found = []

    def build():
        model = load_model(config.model)
        found.append(
            sum(p.numel() + p.ds_tensor.numel() for p in model.parameters())
            / sum(p.ds_numel for p in model.parameters())
        )
        return lora.add_lora(model, config.train.lora, config.train.seed)

    DeepSpeedBackend(build, config.train)
    return found[0]


def test_the_base_is_sharded_as_it_is_loaded(tiny_mixtral, tmp_path):
    assert workers.run(4, share_held, tiny_config(tiny_mixtral, tmp_path, **zero_of(3, 4))) == pytest.approx(
        [1 / 4] * 4, rel=0.01
    )


def test_whole_mixtures_of_experts_are_leaves_and_dense_models_have_none(tiny_model, tiny_mixtral):
    import transformers
    from deepspeed.utils import get_z3_leaf_modules

    def marked(config):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        backends.mark_zero3_leaves(model)
        return [type(m).__name__ for m in get_z3_leaf_modules(model)]

    small = {
        "hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8,
    }
    assert marked(transformers.AutoConfig.from_pretrained(tiny_model)) == []
    assert marked(transformers.AutoConfig.from_pretrained(tiny_mixtral)) == ["MixtralSparseMoeBlock"] * 2
    assert marked(transformers.Qwen3MoeConfig(**small, num_experts=4)) == ["Qwen3MoeSparseMoeBlock"] * 2
    assert (
        marked(transformers.Qwen2MoeConfig(**small, num_experts=4, shared_expert_intermediate_size=8))
        == ["Qwen2MoeSparseMoeBlock"] * 2
    )


def gathers_of_updates(config, marks, persistent):
    """How often ZeRO-3 gathers weights in each update, of one micro-batch, with blocks of experts as leaves or not."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    name, gathers, found = "_PartitionedParameterCoordinator__all_gather_params_", [], []
    gather, step, mark = getattr(Coordinator, name), Trainer.forward_backward, backends.mark_zero3_leaves

    def counted(self, params, *args, **options):
        gathers.append(any(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in params))
        return gather(self, params, *args, **options)

    def counting(self, update):
        before = sum(gathers)
        result = step(self, update)
        found.append(sum(gathers) - before)
        return result

    setattr(Coordinator, name, counted)
    Trainer.forward_backward, backends.mark_zero3_leaves = counting, mark if marks else lambda model: None
    try:
        train_one(config, persistent=persistent)
    finally:
        setattr(Coordinator, name, gather)
        Trainer.forward_backward, backends.mark_zero3_leaves = step, mark
    return found


def test_weights_that_stay_whole_save_gathers_and_leaves_cost_none(tiny_mixtral, tmp_path):
    """Counted behind the first update, in which DeepSpeed learns the order. Leaves save none where transformers has
    fused a block's experts, which are gathered together anyway.
    """
    counts, curves = {}, []
    for marks, persistent in ((True, PERSISTENT), (False, PERSISTENT), (True, 0)):
        config = config_of(tiny_mixtral, tmp_path / f"{marks}-{persistent}", zero_of(3, 2), steps=2)
        (found, other) = workers.run(2, gathers_of_updates, config, marks, persistent)
        assert found == other, "workers gather together"
        counts[marks, persistent] = found[-1]
        curves.append(losses(config))
    print(f"gathers of an update: {counts}")
    assert counts[True, PERSISTENT] <= counts[False, PERSISTENT] and counts[True, PERSISTENT] < counts[True, 0]
    assert all(curve == pytest.approx(curves[0], abs=1e-5) for curve in curves)


def test_settings_are_those_of_the_run():
    config = TrainConfig(workers=4, batch_size=32, backend=BackendConfig(zero_stage=3))
    made = backends.deepspeed_config(config, world=4, micro_batches=2, bf16=True)
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"], made["bf16"]) == (
        4, 2, {"enabled": True},
    )
    assert made["zero_optimization"]["stage"] == 3
    assert not {"offload_optimizer", "offload_param"} & set(made["zero_optimization"])
    away = backends.deepspeed_config(
        config.model_copy(update={"backend": BackendConfig(zero_stage=3, **OFFLOAD)}), world=4, micro_batches=2,
        bf16=False,
    )
    assert {away["zero_optimization"][key]["device"] for key in ("offload_optimizer", "offload_param")} == {"cpu"}


def test_transformers_shards_only_for_stage_3_and_only_as_long_as_the_backend_lives():
    from transformers.integrations import is_deepspeed_zero3_enabled

    made = backends.deepspeed_config(TrainConfig(backend=BackendConfig(zero_stage=2)), 2, 1, False)
    assert backends.shard_while_loading(made) is None and not is_deepspeed_zero3_enabled()
    alive = backends.shard_while_loading(
        backends.deepspeed_config(TrainConfig(backend=BackendConfig(zero_stage=3)), 2, 1, False)
    )
    assert is_deepspeed_zero3_enabled()
    del alive
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize("backend, reason", [
    ({"name": "ddp", "offload_optimizer": True}, "offload_optimizer needs name: deepspeed"),
    ({"zero_stage": 0, "offload_optimizer": True}, "zero_stage 1, 2 or 3"),
    ({"zero_stage": 2, "offload_params": True}, "zero_stage: 3"),
])  # fmt: skip
def test_offloading_what_is_not_sharded_is_refused(backend, reason):
    with pytest.raises(ValueError, match=reason):
        RunConfig.model_validate({"name": "a", "train": {"backend": backend}})
