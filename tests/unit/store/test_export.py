"""Exports are loaded by transformers and peft themselves and answer as base and adapter do; others are refused."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pi_ray import cli
from pi_ray.errors import AdapterError, ConfigError, ModelError, StorageError
from pi_ray.run.artifact import verify_artifact
from pi_ray.store import merged_model
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.export import export_adapter
from tests.bench.families import tiny_model as tiny_random_model
from tests.conftest import tiny
from tests.lora import put_in_store

IDS = torch.tensor([[5, 9, 100, 42, 7]])


def base_of(folder, kind):
    """A base of one file, of many files, in bfloat16, or with layers of (in, out) whose names leave out a part."""
    tiny(folder, "Llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    if kind == "gpt2":
        model = tiny_random_model("gpt2", {"vocab_size": model.config.vocab_size})
    if kind != "one file":
        (folder / "model.safetensors").unlink()
        model.to(torch.bfloat16 if kind == "bfloat16" else torch.float32).save_pretrained(folder, max_shard_size="2MB")
    return folder


def adapter_of(folder, base):
    put_in_store(folder, "colours", base)
    return AdapterStore(folder).open("colours")


@torch.inference_mode()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", ["one file", "shards", "bfloat16", "gpt2"])
def test_a_merged_model_answers_as_base_and_adapter(tmp_path, kind):
    base, said = base_of(tmp_path / "base", kind), []
    adapter = adapter_of(tmp_path / "store", base)
    out = export_adapter(adapter, "merged", tmp_path / "out", said.append)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    alone = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, adapter.path))
    tolerance = 0.1 if kind == "bfloat16" else 1e-4
    assert (logits(found) - expected).abs().max() < tolerance * expected.std() < (alone - expected).abs().max()
    assert AutoTokenizer.from_pretrained(out)("red").input_ids == AutoTokenizer.from_pretrained(base)("red").input_ids
    verify_artifact(out)
    files = len(list(base.glob("*.safetensors")))
    assert (files > 1) == (kind != "one file")
    assert said[:files] == [f"weights: file {i} of {files}" for i in range(1, files + 1)]
    assert "logits differ from those of base and adapter" in said[-1]
    read_me = (out / "README.md").read_text()
    assert "Q: {query}" in read_me and "<|im_start|>user\nQ: What is the status?<|im_end|>" in read_me


def test_a_peft_folder_is_loaded_by_peft(tmp_path, tiny_model):
    adapter = adapter_of(tmp_path / "store", tiny_model)
    out = export_adapter(adapter, "peft", tmp_path / "out", lambda line: None)
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json",
    }
    both = [
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder))
        for folder in (out, adapter.path)
    ]
    assert torch.equal(*both)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)


def test_what_cannot_be_exported_is_said_and_nothing_is_left(tmp_path, tiny_model, monkeypatch):
    adapter = adapter_of(tmp_path / "store", tiny_model)
    with pytest.raises(ConfigError, match="--to onnx: take one of peft, vllm, merged, gguf, ollama, mlx"):
        export_adapter(adapter, "onnx", tmp_path / "out", print)
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="there is something already; name another folder with --out"):
        export_adapter(adapter, "peft", tmp_path / "there", print)
    with monkeypatch.context() as patch:
        patch.setattr(merged_model.AddedWeights, "stored", lambda self, tensors, names: {})
        with pytest.raises(ModelError, match=r"under other names .* export with --to peft"):
            export_adapter(adapter, "merged", tmp_path / "out", print)
    monkeypatch.setattr(merged_model, "_added", lambda weight, *_: weight)
    with pytest.raises(AdapterError, match="the export computes something else than base and adapter"):
        export_adapter(adapter, "merged", tmp_path / "out", lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "there"]


def test_the_verb_says_where_it_is(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter_of(tmp_path / "store", tiny_model)
    assert cli.main(["export", "colours@v0001", "--to", "peft"]) == 0
    assert "Exported  colours-peft; its README.md says what to send" in capsys.readouterr().out
    assert cli.main(["export", "nobody"]) != 0 and "no adapter 'nobody'" in capsys.readouterr().err
