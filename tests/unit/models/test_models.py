"""Base models: how long a text each can read, whatever its config calls that, and in which dtype it trains."""

import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pi_ray.config import ModelConfig, RunConfig
from pi_ray.models import NO_LIMIT, base_digest, context_length, model_dtype, preparation_digest


@pytest.mark.parametrize(("family", "settings", "length"), [
    ("Llama", {"max_position_embeddings": 77}, 77),
    ("GPT2", {"n_positions": 77}, 77),
    ("Bloom", {"seq_length": 77}, 77),
    ("Bloom", {}, NO_LIMIT),
    ("Mpt", {"max_seq_len": 77}, 77),
    ("Mamba", {}, NO_LIMIT),
    ("Gemma3", {"text_config": {"max_position_embeddings": 77}}, 77),
])  # fmt: skip
def test_the_context_is_found_under_each_familys_own_name(family, settings, length, tmp_path):
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(tmp_path)
    assert context_length(ModelConfig(base=str(tmp_path))) == length


@pytest.mark.parametrize(("instructions", "hidden", "device", "dtype"), [
    ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, 576, "cpu", torch.bfloat16),
    ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, 576, "cpu", torch.float32),
    ({"avx512_bf16": True}, 576, "cpu", torch.float32),
    ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, 576, "cpu", torch.bfloat16),
    ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, 64, "cpu", torch.float32),
    ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, 576, "cpu", torch.float32),
    ({}, 576, "cpu", torch.float32),
    ({}, 64, "cuda", torch.bfloat16),
])  # fmt: skip
def test_auto_is_bfloat16_where_it_is_faster(instructions, hidden, device, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: instructions, raising=False)
    transformers.LlamaConfig(hidden_size=hidden).save_pretrained(tmp_path)
    assert model_dtype(ModelConfig(base=str(tmp_path)), device) == dtype
    assert model_dtype(ModelConfig(base=str(tmp_path), dtype="float32"), device) == torch.float32


def test_a_torch_that_does_not_tell_what_the_cpu_can_trains_in_float32(tmp_path, monkeypatch):
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    transformers.LlamaConfig(hidden_size=576).save_pretrained(tmp_path)
    assert model_dtype(ModelConfig(base=str(tmp_path))) == torch.float32


def test_the_content_of_a_base_is_known_by_its_files_and_not_by_its_place(tiny_model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny_model, first)
    shutil.copytree(tiny_model, second)
    (second / "README.md").write_text("says nothing")
    digests = [base_digest(ModelConfig(base=str(folder))) for folder in (first, second)]
    assert digests[0] == digests[1]
    weights = load_file(second / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, second / "model.safetensors", {"format": "pt"})
    assert base_digest(ModelConfig(base=str(second))) != digests[0]


FAULTS = """
import resource, sys, torch
from pi_ray.models import keep_freed_memory

def pass_over():
    kept = [torch.zeros(5_000_000) for _ in range(12)]  # 20 MB each, as the activations of a forward pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
pass_over()
before = pass_over()
print(pass_over() - before)
"""


def test_freed_memory_is_kept_for_the_next_pass():
    """Page faults of a pass that frees as much as the pass before it needed."""
    faults = {
        choice: int(subprocess.run(
            [sys.executable, "-c", FAULTS, choice], check=True, capture_output=True, text=True
        ).stdout)
        for choice in ("keep", "default")
    }  # fmt: skip
    assert faults["keep"] * 3 < faults["default"]


def test_a_local_model_of_preparation_counts_by_its_content_and_a_named_one_does_not(tmp_path):
    for name in ("base", "scorer"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "deep" / "model.safetensors").write_bytes(b"one")
    base, scorer = str(tmp_path / "base"), str(tmp_path / "scorer")
    config = RunConfig(name="t").replace(**{"model.base": base})
    assert preparation_digest(config) == base_digest(config.model)
    assert preparation_digest(config.replace(**{"compress.model": base})) == base_digest(config.model)
    encoder = {"retrieve.encoder": "sentence-transformers", "retrieve.encoder_model": scorer}
    users = [{"compress.model": scorer}, {"compress.documents": {"model": scorer}}, encoder]
    before = [preparation_digest(config.replace(**user)) for user in users]
    (tmp_path / "scorer" / "deep" / "model.safetensors").write_bytes(b"two")
    after = [preparation_digest(config.replace(**user)) for user in users]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert preparation_digest(config.replace(**{"retrieve.encoder_model": scorer})) == base_digest(config.model)
