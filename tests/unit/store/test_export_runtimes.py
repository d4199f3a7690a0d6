"""Exports for llama.cpp, Ollama and mlx-lm, loaded by llama.cpp (xllamacpp) and mlx-lm themselves."""

import json

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pi_ray.config import ModelConfig
from pi_ray.errors import AdapterError
from pi_ray.models import load_model
from pi_ray.models.base_files import gguf_file, resolve_base
from pi_ray.run.artifact import staged, verify_artifact, write_atomic
from pi_ray.store import export_check, gguf_adapter, mlx_adapter
from pi_ray.store.adapters import AdapterStore
from pi_ray.store.export import export_adapter
from pi_ray.store.llama_cpp import next_token_logprobs
from tests.bench.families import tiny_model as tiny_model_of
from tests.lora import card, put_in_store

PACKAGED = "smollm2-135m"
SIZES = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
}


def nothing(line):
    """For what an export says, where no test looks at it."""


def put_random_adapter(store, model, base, strength, **facts):
    """A published adapter of `base`, whose weights are those of `model`."""
    made = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name:
                weight.normal_(0, strength)
    with staged(store / "colours" / "v0001", fingerprint="1") as tmp:
        made.save_pretrained(tmp)
        (tmp / "README.md").unlink(missing_ok=True)
        write_atomic(tmp / "pi_ray.json", json.dumps(card(base, **facts)))
    write_atomic(store / "colours" / "latest.json", json.dumps({"version": "v0001"}))
    return AdapterStore(store).open("colours")


def write_base(model, path):
    """A tiny random model as GGUF, with the packaged model's tokenizer: what llama.cpp's own converter would write."""
    config, kind = model.config, model.config.model_type
    architecture = gguf.MODEL_ARCH[kind.upper()]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if kind == "qwen3" else config.hidden_size // config.num_attention_heads)
    writer.add_value_length(config.head_dim if kind == "qwen3" else config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, field in gguf.GGUFReader(gguf_file(PACKAGED)).fields.items():
        if name.startswith("tokenizer."):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if kind == "llama" else {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = weight.float().numpy()
        if count := heads.get(name.split(".")[-2]):
            halves = values.reshape(count, 2, -1, values.shape[-1])
            values = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["packaged", "llama", "qwen2", "qwen3"])
def adapter(request, tmp_path_factory):
    """One on the packaged base in 4 bits, and on tiny ones with grouped heads in 32."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "packaged":
        model = load_model(ModelConfig(base=PACKAGED, dtype="float32"))
        return put_random_adapter(folder / "store", model, PACKAGED, 0.03)
    sizes = SIZES | ({"head_dim": 128} if request.param == "qwen3" else {})  # as all of them have, and its reader takes
    base = write_base(tiny_model_of(request.param, sizes), folder / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(resolve_base(str(base)), dtype=torch.float32)
    return put_random_adapter(folder / "store", model, base, 0.2)


def test_llama_cpp_computes_what_base_and_adapter_do(adapter, tmp_path):
    said = []
    out = export_adapter(adapter, "gguf", tmp_path / "out", said.append)
    [line] = said
    assert line.startswith("checked by llama.cpp") and "of 3 queries" in line
    nats = float(line.split("differ by ")[1].split()[0])
    base = gguf_file(adapter.card["base"])
    rows = [[1, 4093, 198, 314], [253, 253, 260, 441, 19]]
    alone, adapted = (next_token_logprobs(base, lora, rows) for lora in (None, out / "adapter.gguf"))
    moved = [abs(value - with_it[t]) for without, with_it in zip(alone, adapted, strict=True)
             for t, value in without.items() if t in with_it]
    assert nats < 0.2 and (not moved or np.mean(moved) > 3 * nats), "the adapter moves more than rounding does"
    verify_artifact(out)
    assert "llama-server -m BASE.gguf --lora out/adapter.gguf" in (out / "README.md").read_text()


def test_rows_in_another_order_are_found_by_llama_cpp(tmp_path, monkeypatch):
    model = load_model(ModelConfig(base=PACKAGED, dtype="float32"))
    adapter = put_random_adapter(tmp_path / "store", model, PACKAGED, 0.1)
    monkeypatch.setattr(gguf_adapter, "interleave_halves", lambda matrix, heads: matrix[::-1])
    with pytest.raises(AdapterError, match=r"llama\.cpp's log probabilities differ by .* nothing was written"):
        export_adapter(adapter, "gguf", tmp_path / "out", nothing)
    assert not (tmp_path / "out").exists()


def test_a_modelfile_frames_a_request_as_the_adapter_was_trained(tmp_path):
    model = load_model(ModelConfig(base=PACKAGED, dtype="float32"))
    template = 'Codes in {{ braces }} and "quotes".'
    adapter = put_random_adapter(tmp_path / "store", model, PACKAGED, 0.03, template=template)
    out = export_adapter(adapter, "ollama", tmp_path / "out", nothing)
    lines = (out / "Modelfile").read_text()
    assert lines.splitlines()[1:3] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    frame = lines.split('TEMPLATE """')[1].split('"""')[0]
    said = frame.replace("{{ .Prompt }}", "Why?").replace('{{ "{{" }}', "{{")
    assert said == f"<|im_start|>user\n{template}\n\nQ: Why?<|im_end|>\n<|im_start|>assistant\n"
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER num_predict 6" in lines
    assert (out / "base.gguf").stat().st_size == gguf_file(PACKAGED).stat().st_size


def test_without_a_base_in_gguf_ollama_gets_a_merged_model(tmp_path, tiny_model):
    put_in_store(tmp_path / "store", "colours", tiny_model)
    said = []
    out = export_adapter(AdapterStore(tmp_path / "store").open("colours"), "ollama", tmp_path / "out", said.append)
    assert "FROM .\n" in (out / "Modelfile").read_text() and (out / "model.safetensors").is_file()
    assert said[-1].startswith("checked: logits differ")


def test_mlx_lm_computes_what_base_and_adapter_do(tmp_path, tiny_model, monkeypatch):
    put_in_store(tmp_path / "store", "colours", tiny_model)
    adapter, said = AdapterStore(tmp_path / "store").open("colours"), []
    out = export_adapter(adapter, "mlx", tmp_path / "out", said.append)
    assert said[0].startswith("checked: logits differ")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["num_layers"] == 2 and "self_attn.q_proj" in settings["lora_parameters"]["keys"]
    write = mlx_adapter.save_file
    monkeypatch.setattr(
        mlx_adapter, "save_file", lambda tensors, *at, **how: write({k: 2 * v for k, v in tensors.items()}, *at, **how)
    )
    with pytest.raises(AdapterError, match="the export computes something else"):
        export_adapter(adapter, "mlx", tmp_path / "wrong", nothing)


def test_what_a_kind_cannot_express_names_another_one(tmp_path, tiny_model):
    tiny_model_of("gpt2", {"vocab_size": 100}).save_pretrained(tmp_path / "gpt2")
    put_in_store(tmp_path / "store", "other", tmp_path / "gpt2")
    with pytest.raises(AdapterError, match="not of gpt2; take --to merged"):
        export_adapter(AdapterStore(tmp_path / "store").open("other"), "gguf", tmp_path / "out", nothing)
    prompt = {"chat": "chatml", "query": "{query}", "conversation": True}
    put_in_store(tmp_path / "store", "talker", tiny_model, prompt=prompt)
    with pytest.raises(AdapterError, match="trained on conversations; serve it with --to vllm or --to merged"):
        export_adapter(AdapterStore(tmp_path / "store").open("talker"), "ollama", tmp_path / "out", nothing)
    assert not (tmp_path / "out").exists()


def test_where_a_runtime_is_missing_the_export_says_what_brings_it(tmp_path, tiny_model, monkeypatch):
    put_in_store(tmp_path / "store", "colours", tiny_model)
    adapter, said = AdapterStore(tmp_path / "store").open("colours"), []
    export_adapter(adapter, "gguf", tmp_path / "no-base", said.append)
    monkeypatch.setattr(export_check, "find_spec", lambda name: None)
    export_adapter(adapter, "gguf", tmp_path / "no-llama", said.append)
    export_adapter(adapter, "mlx", tmp_path / "no-mlx", said.append)
    assert ["which is not here" in said[0], "pip install xllamacpp" in said[1], "takes mlx-lm" in said[2]] == [True] * 3
