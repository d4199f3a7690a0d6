"""Adapters beside one base: every row gets its own adapter's products, hostile folders reach no other row, memory
follows what is loaded.
"""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pi_ray.config import ModelConfig
from pi_ray.errors import AdapterError
from pi_ray.models import load_model
from pi_ray.serve.engine import multi_lora as module
from pi_ray.serve.engine import multi_lora_layer
from pi_ray.serve.engine.multi_lora import MultiLora, NoRoomError
from pi_ray.serve.engine.multi_lora_layer import BASE_SLOT
from tests.lora import write_adapter

LAYER = "model.layers.0.self_attn.q_proj"
IDS = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16], [17, 18, 19]])


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """Three adapters of ranks 4, 2 and 4; the second one adapts two layers alone."""
    root = tmp_path_factory.mktemp("adapters")
    made = [write_adapter(root / f"a{i}", tiny_model, seed=i, rank=rank) for i, rank in enumerate((4, 2, 4))]
    tensors = load_file(made[1] / "adapter_model.safetensors")
    save_file(
        {
            name: t
            for name, t in tensors.items()
            if "layers.0.self_attn.q_proj" in name or "layers.1.mlp.down_proj" in name
        },
        made[1] / "adapter_model.safetensors",
    )
    return [str(folder) for folder in made]


@pytest.fixture
def base(tiny_model):
    return load_model(ModelConfig(base=str(tiny_model)))


@pytest.fixture(scope="module")
def expected(tiny_model, folders):
    """Logits of every row under every adapter, by peft; the last entry is the base's."""
    from peft import PeftModel

    def logits(model):
        with torch.no_grad():
            return model(input_ids=IDS).logits

    return [
        logits(PeftModel.from_pretrained(load_model(ModelConfig(base=str(tiny_model))), folder).eval())
        for folder in folders
    ] + [logits(load_model(ModelConfig(base=str(tiny_model))))]


@torch.inference_mode()
def logits(base, multi_lora, slots, tokens=IDS.shape[1]):
    """Of prompts; with tokens=1 of the first token alone, as in a decoding step."""
    multi_lora.set_active_slots(slots, tokens)
    return base(input_ids=IDS[: len(slots), :tokens]).logits


def variant(folder, target, edit=lambda tensors: None, **settings):
    """A copy of an adapter folder with changed tensors and settings."""
    target.mkdir()
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return str(target)


@pytest.mark.parametrize("padding", [0, 10**6], ids=["in turn", "at once"])
@pytest.mark.parametrize(
    "rows", [[0, 0, 0, 0, 0], [0, 1, 2, 1, 0], [3, 0, 3, 3, 1], [3, 3, 3, 3, 3], [1, 1, 3, 2, 2]], ids=str
)
def test_each_row_has_the_logits_of_its_own_adapter(base, folders, expected, monkeypatch, rows, padding):
    monkeypatch.setattr(multi_lora_layer, "MAX_PADDING", padding)
    multi_lora = MultiLora(base, 3)
    slots = [*(multi_lora.load(folder, folders) for folder in folders), BASE_SLOT]
    for tokens in (3, 1):
        found = logits(base, multi_lora, [slots[r] for r in rows], tokens)
        for i, r in enumerate(rows):
            torch.testing.assert_close(found[i], expected[r][i, :tokens], atol=1e-5, rtol=1e-4)
    assert len({expected[r][0].argmax().item() for r in range(4)}) > 1


@pytest.mark.fault
@pytest.mark.parametrize("step", ["__init__", "resize", "set_slot"])
def test_an_adapter_whose_loading_failed_halfway_is_loaded_anew(base, folders, expected, monkeypatch, step):
    multi_lora = MultiLora(base, 3)
    multi_lora.load(folders[1])
    whole, calls = getattr(module.MultiLoraLayer, step), []

    def fail_later(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.MultiLoraLayer, step, fail_later)
        with pytest.raises(MemoryError):
            multi_lora.load(folders[0])
            multi_lora.load(folders[2])
    assert multi_lora.evictions == 0
    slots = [multi_lora.load(folder, folders) for folder in folders]
    found = logits(base, multi_lora, slots)
    for i in range(3):
        torch.testing.assert_close(found[i], expected[i][i], atol=1e-5, rtol=1e-4)


def test_rows_without_an_adapter_are_the_bare_base_to_the_bit(base, folders, expected):
    multi_lora = MultiLora(base, 2)
    slot = multi_lora.load(folders[0])
    for tokens in (3, 1):
        found = logits(base, multi_lora, [BASE_SLOT, slot, BASE_SLOT, slot, BASE_SLOT], tokens)
        assert torch.equal(found[[0, 2, 4]], logits(base, multi_lora, [BASE_SLOT] * 5, tokens)[[0, 2, 4]])
    assert torch.equal(logits(base, multi_lora, [BASE_SLOT] * 5), expected[3])


def test_the_least_recently_used_idle_adapter_is_evicted(base, folders):
    multi_lora = MultiLora(base, 2)
    multi_lora.load(folders[0])
    multi_lora.load(folders[1])
    multi_lora.load(folders[0])
    multi_lora.load(folders[2])
    assert list(multi_lora._loaded) == [folders[0], folders[2]]
    multi_lora.load(folders[1], in_use=[folders[0]])
    assert list(multi_lora._loaded) == [folders[0], folders[1]]
    assert (
        not multi_lora.has_room_for(folders[2], in_use=folders[:2])
        and multi_lora.has_room_for(folders[0], in_use=folders[:2])
        and multi_lora.has_room_for("", in_use=folders[:2])
    )
    assert (multi_lora.hits, multi_lora.misses, multi_lora.evictions) == (1, 4, 2)


def test_memory_grows_and_shrinks_with_the_ranks_that_are_loaded(base, folders, expected):
    multi_lora = MultiLora(base, 2)
    low = multi_lora.load(folders[1])
    small = multi_lora.nbytes
    assert len(multi_lora._layers) == 2
    high = multi_lora.load(folders[0])
    ranks = {name: layer.a.shape[:2] for name, layer in multi_lora._layers.items()}
    assert multi_lora.nbytes > small and set(ranks.values()) == {(2, 4)}
    found = logits(base, multi_lora, [low, high])
    torch.testing.assert_close(found, torch.stack([expected[1][0], expected[0][1]]), atol=1e-5, rtol=1e-4)
    one = MultiLora(base, 1)
    for folder in (folders[0], folders[1]):
        one.load(folder)
    assert one.nbytes == small and {layer.a.shape[:2] for layer in one._layers.values()} == {(1, 2)}


def wide(folder, target, rank=48):
    """An adapter of a high rank on a single layer."""

    def only_one(tensors):
        b, a = (tensors[f"base_model.model.{LAYER}.lora_{side}.weight"] for side in "BA")
        tensors.clear()
        for side, shape in (("A", (rank, a.shape[1])), ("B", (b.shape[0], rank))):
            tensors[f"base_model.model.{LAYER}.lora_{side}.weight"] = torch.ones(shape)

    return variant(folder, target, only_one, r=rank)


@pytest.mark.fault
def test_an_adapter_of_a_high_rank_on_one_layer_grows_that_layer_alone(base, folders, tmp_path):
    multi_lora = MultiLora(base, 2)
    multi_lora.load(folders[0])
    before = {name: layer.a.shape[1] for name, layer in multi_lora._layers.items()}
    multi_lora.load(wide(folders[0], tmp_path / "wide"))
    assert {name: layer.a.shape[1] for name, layer in multi_lora._layers.items()} == before | {LAYER: 48}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"max_rank": 40}, r"rank 48; this server takes up to 40 \(serve.max_lora_rank"),
     ({"max_bytes": 8192}, r"takes 0\.0 MiB of memory; .* \(serve.max_lora_mb")],
)
def test_an_adapter_beyond_the_limits_is_refused_before_a_tensor_is_read(
    base, folders, tmp_path, monkeypatch, limits, reason
):
    def load(data):
        raise AssertionError("a tensor was read")

    multi_lora = MultiLora(base, 2, **limits)
    monkeypatch.setattr("safetensors.torch.load", load)
    with pytest.raises(AdapterError, match=reason):
        multi_lora.load(wide(folders[0], tmp_path / "wide"))
    assert multi_lora.nbytes == 0 and len(multi_lora) == 0


def test_idle_adapters_make_room_within_the_memory_and_those_in_use_are_waited_for(base, folders):
    large = MultiLora(base, 1)
    large.load(folders[0])
    multi_lora = MultiLora(base, 4, max_bytes=large.nbytes + 1)
    multi_lora.load(folders[0])
    assert multi_lora.has_room_for(folders[2], in_use=folders[:1]), "its size is not known yet"
    with pytest.raises(NoRoomError):
        multi_lora.load(folders[2], in_use=folders[:1])
    assert not multi_lora.has_room_for(folders[2], in_use=folders[:1]) and multi_lora.has_room_for(folders[2], [])
    assert list(multi_lora._loaded) == [folders[0]]
    multi_lora.load(folders[2])
    assert list(multi_lora._loaded) == [folders[2]] and multi_lora.nbytes == large.nbytes


@pytest.mark.fault
def test_a_thousand_adapter_switches_leak_no_objects_memory_or_hooks(base, folders, tmp_path):
    many = [variant(folders[1], tmp_path / f"v{i}", lambda t, i=i: [x.add_(i) for x in t.values()]) for i in range(12)]
    first = [
        load_file(f"{folder}/adapter_model.safetensors")[f"base_model.model.{LAYER}.lora_A.weight"][0, 0]
        for folder in many
    ]
    multi_lora = MultiLora(base, 4)

    def switch(times):
        for i in range(times):
            slot = multi_lora.load(many[i % 12])
            assert multi_lora._layers[LAYER].a[slot, 0, 0] == first[i % 12]
        gc.collect()
        return (
            len(gc.get_objects()), sys.getallocatedblocks(), multi_lora.nbytes,
            [len(m._forward_hooks) for m in base.modules() if m._forward_hooks],
        )

    before = switch(24)
    after = switch(1000)
    assert after[2:] == before[2:] and len(multi_lora) == 4
    assert abs(after[0] - before[0]) < 200 and abs(after[1] - before[1]) < 1000, "less than a block a switch"


@pytest.mark.fault
def test_settings_of_a_hostile_config_have_no_effect(base, folders, expected, tmp_path):
    folder = variant(
        folders[0], tmp_path / "x", target_modules=".*", modules_to_save=["lm_head"], auto_map={"m": "evil.py"},
        bias="all", use_dora=True, fan_in_fan_out=True,
    )
    multi_lora = MultiLora(base, 1)
    torch.testing.assert_close(
        logits(base, multi_lora, [multi_lora.load(folder)] * 5), expected[0], atol=1e-5, rtol=1e-4
    )


def test_rank_stabilised_scaling_is_alpha_over_the_root_of_the_rank(base, folders, tmp_path):
    plain = variant(folders[0], tmp_path / "plain", lora_alpha=8, r=4)
    stabilised = variant(folders[0], tmp_path / "stabilised", lora_alpha=4, use_rslora=True)
    multi_lora = MultiLora(base, 2)
    slots = [multi_lora.load(plain), multi_lora.load(stabilised)]
    torch.testing.assert_close(logits(base, multi_lora, slots[:1] * 2), logits(base, multi_lora, slots[1:] * 2))


def test_an_adapter_that_does_not_fit_the_base_is_refused_and_loaded_ones_stay(base, folders, expected, tmp_path):
    multi_lora = MultiLora(base, 1)
    slot = multi_lora.load(folders[0])

    def rename(tensors):
        for name in [n for n in tensors if "layers.1" in n]:
            tensors[name.replace("layers.1", "layers.9")] = tensors.pop(name)

    def widen(tensors):
        name = next(n for n in tensors if "lora_B" in n)
        tensors[name] = torch.zeros(3, 4)

    for i, (edit, reason) in enumerate([(rename, "layers.9"), (widen, "has size 3")]):
        with pytest.raises(AdapterError, match=reason):
            multi_lora.load(variant(folders[0], tmp_path / str(i), edit))
    torch.testing.assert_close(logits(base, multi_lora, [slot] * 5), expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.fault
def test_a_scaling_that_overflows_is_refused(base, folders, tmp_path):
    with pytest.raises(AdapterError, match="too large"):
        MultiLora(base, 1).load(variant(folders[0], tmp_path / "x", lora_alpha=1e300))


@pytest.mark.fault
def test_an_adapter_that_is_refused_evicts_none(base, folders, tmp_path):
    multi_lora = MultiLora(base, 1)
    multi_lora.load(folders[0])
    with pytest.raises(AdapterError, match="too large"):
        multi_lora.load(variant(folders[0], tmp_path / "x", lora_alpha=1e300))
    assert list(multi_lora._loaded) == [folders[0]]


@pytest.mark.fault
@pytest.mark.parametrize("padding", [0, 10**6], ids=["in turn", "at once"])
def test_a_row_that_computes_nan_does_not_reach_its_neighbours(base, folders, expected, tmp_path, monkeypatch, padding):
    monkeypatch.setattr(multi_lora_layer, "MAX_PADDING", padding)
    wild = variant(folders[0], tmp_path / "wild", lambda t: [x.mul_(1e30) for x in t.values()])
    multi_lora = MultiLora(base, 3)
    slots = [multi_lora.load(wild), multi_lora.load(folders[0]), multi_lora.load(folders[2])]
    for tokens in (3, 1):
        found = logits(base, multi_lora, [slots[1], slots[0], slots[2], BASE_SLOT, slots[1]], tokens)
        assert not found[1].isfinite().all()
        for i, r in ((0, 0), (2, 2), (3, 3), (4, 0)):
            torch.testing.assert_close(found[i], expected[r][i, :tokens], atol=1e-5, rtol=1e-4)


def test_an_adapter_of_single_experts_is_refused(folders, tmp_path):
    class Sparse(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})

    def on_an_expert(tensors):
        tensors.clear()
        tensors.update({f"base_model.model.model.experts.0.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"})

    with pytest.raises(AdapterError, match="not served beside others; merge it"):
        MultiLora(Sparse(), 1).load(variant(folders[0], tmp_path / "x", on_an_expert))


def test_a_merged_adapter_is_served_alone_without_low_rank_products(base, folders, expected):
    multi_lora = MultiLora(base, 2)
    multi_lora.merge(folders[0])
    slot = multi_lora.load(folders[0])
    assert slot == BASE_SLOT and multi_lora.nbytes == 0
    torch.testing.assert_close(logits(base, multi_lora, [slot] * 5), expected[0], atol=1e-4, rtol=1e-4)
    for other, reason in ((folders[1], "no other one"), ("", "not the bare base")):
        with pytest.raises(AdapterError, match=f"merged into the base model.*{reason}"):
            multi_lora.load(other)


def test_merging_into_a_head_that_is_tied_to_the_embeddings_leaves_those_alone(tiny_model, folders, tmp_path):
    base = load_model(ModelConfig(base=str(tiny_model)))
    base.lm_head.weight = base.model.embed_tokens.weight
    before = base.model.embed_tokens.weight.clone()
    MultiLora(base, 1).merge(variant(folders[0], tmp_path / "x", on_the_head))
    assert torch.equal(base.model.embed_tokens.weight, before)
    assert not torch.equal(base.lm_head.weight, before)


def on_the_head(tensors):
    size = 49152
    tensors.clear()
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 32)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(size, 4)
