"""Export: a published adapter as a folder that other tools take, by itself or added into its base model's weights.

    peft, vllm   a PEFT folder, as peft, vLLM and LoRAX load it
    merged       a model in the transformers layout
    gguf         the adapter for llama.cpp
    ollama       a Modelfile with the prompt's text: on a base in GGUF beside that and the adapter, else a merged model
    mlx          the adapter for mlx-lm

What was exported is loaded again and compared with base and adapter (export_check.py).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.errors import AdapterError, ConfigError, StorageError
from pi_ray.models import load_model_config, load_tokenizer
from pi_ray.models.base_files import PACKAGED, gguf_file
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import staged, write_atomic
from pi_ray.store.adapters import Adapter
from pi_ray.store.export_check import QUERIES, check_export
from pi_ray.store.gguf_adapter import GGUF_ADAPTER, write_gguf_adapter
from pi_ray.store.merged_model import write_merged
from pi_ray.store.mlx_adapter import write_mlx_adapter
from pi_ray.store.modelfile import modelfile_text
from pi_ray.store.prompt_guard import PROMPT_FILE
from pi_ray.store.verify import CONFIG_FILE, LORA_TENSOR, WEIGHTS_FILE, open_weights, read_json

KINDS = ("peft", "vllm", "merged", "gguf", "ollama", "mlx")
GGUF_BASE = "base.gguf"
USES = {  # kind -> (what it is, the commands that use it)
    "peft": ("A PEFT adapter", 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")'),
    "vllm": (
        "A PEFT adapter, for vLLM",
        "vllm serve {base} --enable-lora --max-lora-rank {max_rank} --lora-modules {name}={folder}",
    ),
    "merged": ("The base model with the adapter in its weights", 'AutoModelForCausalLM.from_pretrained("{folder}")'),
    "gguf": ("An adapter for llama.cpp", "llama-server -m BASE.gguf --lora {folder}/adapter.gguf"),
    "ollama": ("A model for Ollama", "cd {folder} && ollama create {name} -f Modelfile\nollama run {name}"),
    "mlx": (
        "An adapter for mlx-lm",
        "mlx_lm.generate --model {base} --adapter-path {folder} --ignore-chat-template --prompt -",
    ),
}


def export_adapter(adapter: Adapter, kind: str, folder: Path, say: Callable[[str], Any], check: bool = True) -> Path:
    """Write the folder, which must not exist yet.

    Raises ConfigError for another kind, StorageError where the folder exists, ModelError for a base that cannot be
    read, AdapterError for an adapter that the kind cannot express, and where the export computes something else than
    base and adapter.
    """
    if kind not in KINDS:
        raise ConfigError(f"--to {kind}: take one of {', '.join(KINDS)}")
    if folder.exists():
        raise StorageError(f"{folder}: there is something already; name another folder with --out")
    model = ModelConfig(base=adapter.card["base"], revision=adapter.card.get("revision", ""))
    with staged(folder, adapter=adapter.name, version=adapter.version, kind=kind) as tmp:
        _write(adapter, model, kind, tmp, say)
        write_atomic(tmp / "README.md", _read_me(adapter, kind, model, folder))
        if check:
            say(check_export(adapter, model, tmp))
    return folder


def _write(adapter: Adapter, model: ModelConfig, kind: str, folder: Path, say: Callable[[str], Any]) -> None:
    settings = read_json(adapter.path / CONFIG_FILE)
    targets = settings.get("target_parameters") or []
    if targets and kind in ("vllm", "gguf", "mlx"):
        raise AdapterError(f"--to {kind}: it adapts fused experts, for which that has no layout; take --to merged")
    if kind in ("peft", "vllm"):
        _write_peft(adapter, settings, folder)
        return
    scale, pairs = _read_pairs(adapter, settings)
    gguf_base = gguf_file(model.base) if kind == "ollama" and not targets else None
    if kind == "merged" or (kind == "ollama" and not gguf_base):
        write_merged(model, scale, pairs, targets, folder, say)
    elif kind == "mlx":
        write_mlx_adapter(load_model_config(model), _hub_id(model.base), scale, pairs, folder)
    else:
        write_gguf_adapter(load_model_config(model), scale, pairs, folder / GGUF_ADAPTER)
    if kind == "ollama":
        encoder = PromptEncoder(load_tokenizer(model), PromptConfig(**adapter.card["prompt"]))
        files = (f"./{GGUF_BASE}", f"./{GGUF_ADAPTER}") if gguf_base else (".",)
        write_atomic(folder / "Modelfile", modelfile_text(adapter, encoder, *files))
        if gguf_base:
            shutil.copyfile(gguf_base, folder / GGUF_BASE)


def _hub_id(base: str) -> str:
    """The base's name as other tools know it: of a packaged one its hub id."""
    return PACKAGED[base].hub_id if base in PACKAGED else base


def _write_peft(adapter: Adapter, settings: dict[str, Any], folder: Path) -> None:
    """peft's two files; a packaged base is named by its hub id."""
    shutil.copyfile(adapter.path / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    settings = settings | {"base_model_name_or_path": _hub_id(adapter.card["base"])}
    write_atomic(folder / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")


def _read_pairs(
    adapter: Adapter, settings: dict[str, Any]
) -> tuple[float, dict[tuple[str, str], torch.Tensor]]:
    """(scale, (module, "A" or "B") -> matrix) of a verified adapter."""
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
    pairs = {}
    with open_weights(adapter.path / WEIGHTS_FILE) as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dict)
            match = LORA_TENSOR.fullmatch(name)
            assert match, "verification lets no other names through"
            pairs[match[1], match[2]] = weights.get_tensor(name)
    return scale, pairs


def _read_me(adapter: Adapter, kind: str, model: ModelConfig, folder: Path) -> str:
    """The export's README: how to use it, what the model card says of the prompt, and the text of one request."""
    file, wording = adapter.path / "README.md", PromptConfig(**adapter.card["prompt"])
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    sent = card.partition("## Prompt\n")[2].partition("\n## ")[0].strip().splitlines()
    sent = [line for line in sent if PROMPT_FILE not in line] or [f"Send the query, worded as {wording.query!r}."]
    what, command = USES[kind]
    rank = read_json(adapter.path / CONFIG_FILE)["r"]
    command = command.format(
        base=_hub_id(adapter.card["base"]), folder=folder.name, name=adapter.name,
        max_rank=max(8, 1 << (rank - 1).bit_length()),
    )
    parts = [
        f"# {adapter.name} {adapter.version}",
        f"{what}, of the base model {adapter.card['base']}; exported by pi-ray.",
        f"```{'python' if kind in ('peft', 'merged') else 'bash'}\n{command}\n```",
        "## Prompt\n\n" + "\n".join(sent),
    ]
    if not wording.conversation:
        encoder = PromptEncoder(load_tokenizer(model), wording)
        text = encoder.tokenizer.decode(encoder.encode(QUERIES[0], adapter.card["template"]))
        how = f"What the model reads for the query {QUERIES[0]!r}, with no chat frame of another tool around it:"
        if kind == "ollama":
            how = f"What the model reads for the query {QUERIES[0]!r}, by the Modelfile's TEMPLATE:"
        parts.append(f"## The text of one request\n\n{how}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"
