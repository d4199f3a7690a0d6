"""Adapters of fused experts: merged into a server's base and exported, they compute what peft computes."""

import asyncio
import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pi_ray.config import ModelConfig
from pi_ray.errors import AdapterError
from pi_ray.models import load_model, load_tokenizer
from pi_ray.serve.engine import vllm
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.export import export_adapter
from pi_ray.store.publish import model_card
from pi_ray.store.verify import read_json, verify_adapter
from tests.bench.families import FAMILIES, tiny_model
from tests.lora import put_in_store, rewrite

IDS = torch.tensor([[5, 9, 100, 42, 7]])
# gpt-oss and Llama 4 hold (experts, in, out), the others (experts, out, in)
MIXTURES = ("Mixtral", "Qwen3-MoE", "Qwen3-Next", "gpt-oss", "Llama 4", "DeepSeek-V3", "GLM-4-MoE")


@pytest.fixture(scope="module", params=MIXTURES)
def adapter(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    model_type, settings = FAMILIES[request.param]
    tokenizer = load_tokenizer(ModelConfig())
    tokenizer.save_pretrained(folder / "base")
    tiny_model(model_type, {**settings, "vocab_size": len(tokenizer)}).save_pretrained(folder / "base")
    put_in_store(folder / "store", "colours", folder / "base", experts=True)
    return AdapterStore(folder / "store").open("colours")


def base_of(adapter):
    return adapter.card["base"]


@torch.inference_mode()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def expected(adapter):
    bare = AutoModelForCausalLM.from_pretrained(base_of(adapter), dtype=torch.float32)
    alone = logits(bare)
    found = logits(PeftModel.from_pretrained(bare, adapter.path))
    assert (found - alone).abs().max() > 0.1 * found.std()
    return found


def is_close(found, expected):
    return (found - expected).abs().max() < 1e-4 * expected.std()


def test_a_server_merges_it(adapter, expected):
    base = load_model(ModelConfig(base=base_of(adapter)))
    MultiLora(base, 1).merge(str(adapter.path))
    assert is_close(logits(base), expected)


def test_beside_others_it_is_refused_with_the_two_ways_out(adapter):
    loras = MultiLora(load_model(ModelConfig(base=base_of(adapter))), 2)
    with pytest.raises(AdapterError, match=r"not served beside others; merge it \(serve.merge\), or 'pi-ray export"):
        loras.load(str(adapter.path))
    assert not len(loras) and not loras.nbytes


def test_a_merged_export_computes_the_same_from_the_names_that_the_checkpoint_has(adapter, expected, tmp_path):
    said = []
    out = export_adapter(adapter, "merged", tmp_path / "out", said.append)
    assert is_close(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), expected)
    assert "logits differ from those of base and adapter" in said[-1]
    tensors = [safe_open(f"{folder}/model.safetensors", "pt").keys() for folder in (out, base_of(adapter))]
    assert set(tensors[0]) == set(tensors[1])


def test_a_peft_folder_is_loaded_by_peft_and_other_layouts_are_refused(adapter, expected, tmp_path):
    out = export_adapter(adapter, "peft", tmp_path / "out", print)
    bare = AutoModelForCausalLM.from_pretrained(base_of(adapter), dtype=torch.float32)
    assert is_close(logits(PeftModel.from_pretrained(bare, out)), expected)
    for kind in ("vllm", "gguf", "mlx"):
        with pytest.raises(AdapterError, match=f"--to {kind}: it adapts fused experts, .* take --to merged"):
            export_adapter(adapter, kind, tmp_path / kind, print)


def test_a_matrix_of_another_number_of_experts_is_refused(adapter, tmp_path):
    """More experts than the base has, as a hostile folder may claim: verified by itself, refused by the server."""
    folder = tmp_path / "a"
    folder.mkdir()
    for file in adapter.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = torch.cat([tensors[name]] * 2, dim=int("lora_B" in name))
    save_file(tensors, tmp_path / "more.safetensors")
    rewrite(folder, "adapter_model.safetensors", (tmp_path / "more.safetensors").read_bytes())
    verify_adapter(folder)
    with pytest.raises(AdapterError, match=r"its matrix [AB] for '.*experts.*' has size"):
        MultiLora(load_model(ModelConfig(base=base_of(adapter))), 1).merge(str(folder))


@pytest.fixture
def mixtral(tiny_mixtral, tmp_path):
    put_in_store(tmp_path / "store", "colours", tiny_mixtral, experts=True)
    return AdapterStore(tmp_path / "store").open("colours")


def test_ranks_are_whole_for_each_expert_and_only_for_modules_with_target_parameters(mixtral):
    settings = read_json(mixtral.path / "adapter_config.json")
    for changes, reason in (
        ({"target_parameters": None}, "has rank 16, adapter_config.json says 4"),
        ({"target_parameters": ["mlp.other"]}, "has rank 16, adapter_config.json says 4"),
        ({"target_parameters": ["(a+)+$"]}, "target_parameters must be a list of names"),
        ({"target_parameters": ["experts.down_proj"] * 65}, "List should have at most 64 items"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters must be a list of names"),
        ({"r": 3}, "has rank"),
    ):
        rewrite(mixtral.path, "adapter_config.json", {**settings, **changes})
        with pytest.raises(AdapterError, match=reason):
            verify_adapter(mixtral.path)


def test_vllm_refuses_it(mixtral):
    loader = vllm.VerifiedDownloader(str(mixtral.path.parents[1]), ModelConfig(base=base_of(mixtral)), 64)
    with pytest.raises(AdapterError, match=r"adapts fused experts, which serve\.engine vllm does not"):
        asyncio.run(loader.load_model_from_config(f"colours@v0001#{mixtral.hash}", None))


def test_the_model_card_says_how_to_serve_it(mixtral):
    settings = json.loads((mixtral.path / "adapter_config.json").read_text())
    shown = model_card("colours", "v0001", mixtral.card, settings, {}, False)
    assert "    pi-ray serve run.yaml serve.merge=colours\n" in shown
    plain = model_card("colours", "v0001", mixtral.card, {**settings, "target_parameters": None}, {}, False)
    assert "    pi-ray serve run.yaml\n" in plain and "experts" not in plain
