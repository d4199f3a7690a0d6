"""Export: a published adapter as a folder that other tools take, by itself or added into its base model's weights.

`peft` is a PEFT folder, as vLLM, LoRAX and peft load it. `merged` is a model in the transformers layout: the base's
safetensors are read and written a file at a time, so that no more than one of them is in memory, in the dtype that they
have. What was exported is loaded again and its logits are compared with those of base and adapter.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.errors import AdapterError, ConfigError, ModelError, StorageError
from pi_ray.models import PACKAGED, load_model, load_tokenizer, resolve_base
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import staged, write_atomic
from pi_ray.store.adapters import Adapter
from pi_ray.store.prompt_guard import PROMPT_FILE
from pi_ray.store.verify import CONFIG_FILE, LORA_TENSOR, WEIGHTS_FILE, open_weights, read_json

KINDS = ("peft", "merged")
COPIED = {".json", ".model", ".txt", ".jinja", ".tiktoken"}  # endings of settings and tokenizers
QUERIES = ("What is the status?", "Please list all of them, newest first.", "Why?")  # on which logits are compared
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of their spread
MOST_LEFT_OUT = 2  # names of modules at the beginning that a checkpoint may leave out


def export_adapter(adapter: Adapter, kind: str, folder: Path, say: Callable[[str], Any], check: bool = True) -> Path:
    """Write the folder, which must not exist yet.

    Raises ConfigError for another kind, StorageError where the folder exists, ModelError for a base that cannot be
    read, AdapterError where the export computes something else than base and adapter.
    """
    if kind not in KINDS:
        raise ConfigError(f"--to {kind}: take one of {', '.join(KINDS)}")
    if folder.exists():
        raise StorageError(f"{folder}: there is something already; name another folder with --out")
    model = ModelConfig(base=adapter.card["base"], revision=adapter.card.get("revision", ""))
    with staged(folder, adapter=adapter.name, version=adapter.version, kind=kind) as tmp:
        if kind == "peft":
            _write_peft(adapter, tmp)
        else:
            _write_merged(adapter, model, tmp, say)
        write_atomic(tmp / "README.md", _read_me(adapter, kind, model))
        if check:
            say(f"checked: logits differ from those of base and adapter by {_check(adapter, model, kind, tmp):.1e} of "
                "their spread")
    return folder


def _write_peft(adapter: Adapter, folder: Path) -> None:
    """peft's two files; a packaged base is named by its hub id, which other tools know."""
    shutil.copyfile(adapter.path / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    settings, base = read_json(adapter.path / CONFIG_FILE), adapter.card["base"]
    settings["base_model_name_or_path"] = PACKAGED[base][2] if base in PACKAGED else base
    write_atomic(folder / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")


def _write_merged(adapter: Adapter, model: ModelConfig, folder: Path, say: Callable[[str], Any]) -> None:
    source, (scale, pairs) = _base_folder(model), _read_pairs(adapter)
    files = sorted(path for path in source.iterdir() if path.name.endswith(".safetensors"))
    if not files:
        raise ModelError(f"{source}: its weights are no safetensors; convert them, or export with --to peft")
    names = {name for path in files for name in _names(path)}
    places = _places(names, {module for module, _ in pairs})
    if unplaced := sorted({module for module, _ in pairs} - places.keys()):
        raise ModelError(
            f"{model.base} stores {unplaced[0]} (and {len(unplaced) - 1} more) under other names than transformers "
            "loads it by, so that the adapter cannot be added file by file; export with --to peft"
        )
    modules, turned = {name: module for module, name in places.items()}, _turned_modules(source)
    for i, path in enumerate(files, start=1):
        tensors = {}
        with safe_open(path, "pt") as shard:
            metadata = shard.metadata() or {"format": "pt"}
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                weight = shard.get_tensor(name)
                if module := modules.get(name):
                    product = (pairs[module, "B"].float() @ pairs[module, "A"].float()) * scale
                    weight = _added(weight, product.T if module in turned else product, name)
                tensors[name] = weight
        save_file(tensors, folder / path.name, metadata=metadata)
        say(f"weights: file {i} of {len(files)}")
    for path in source.iterdir():
        if path.suffix in COPIED and path.name != "manifest.json":
            shutil.copyfile(path, folder / path.name)


def _added(weight: torch.Tensor, product: torch.Tensor, name: str) -> torch.Tensor:
    if product.shape != weight.shape or not weight.is_floating_point():
        raise ModelError(f"{name}: the base stores a weight of another shape or kind than the adapter was trained on")
    return (weight.float() + product).to(weight.dtype).contiguous()


def _turned_modules(folder: Path) -> set[str]:
    """The modules whose weight is (in, out), as GPT-2 has them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _base_folder(model: ModelConfig) -> Path:
    """The folder with the base model's files; those of a hub id are fetched."""
    found = resolve_base(model.base)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    try:
        endings = [f"*{ending}" for ending in (*COPIED, ".safetensors")]
        return Path(snapshot_download(found, revision=model.revision or "main", allow_patterns=endings))
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{model.base}' cannot be fetched: {str(error).strip().splitlines()[0]}") from error


def _names(path: Path) -> Iterator[str]:
    with safe_open(path, "pt") as shard:
        yield from shard.keys()


def _read_pairs(adapter: Adapter) -> tuple[float, dict[tuple[str, str], torch.Tensor]]:
    """(scale, (module, "A" or "B") -> matrix) of a verified adapter."""
    settings = read_json(adapter.path / CONFIG_FILE)
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
    pairs = {}
    with open_weights(adapter.path / WEIGHTS_FILE) as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dict)
            match = LORA_TENSOR.fullmatch(name)
            assert match, "verification lets no other names through"
            pairs[match[1], match[2]] = weights.get_tensor(name)
    return scale, pairs


def _places(names: set[str], modules: set[str]) -> dict[str, str]:
    """Module -> the tensor that is its weight. A checkpoint may leave out the name of the decoder inside the model."""
    found = {}
    for module in modules:
        parts = module.split(".")
        candidates = (".".join([*parts[start:], "weight"]) for start in range(MOST_LEFT_OUT + 1))
        if name := next((candidate for candidate in candidates if candidate in names), ""):
            found[module] = name
    return found


@torch.inference_mode()
def _check(adapter: Adapter, model: ModelConfig, kind: str, folder: Path) -> float:
    """The largest difference of logits over their standard deviation. Raises AdapterError for a large one."""
    from peft import PeftModel

    wording = PromptConfig(**adapter.card["prompt"])
    encoder = PromptEncoder(load_tokenizer(model), wording)
    if wording.conversation:
        rows = [encoder.tokenizer(query).input_ids for query in QUERIES]
    else:
        rows = [encoder.encode(query, adapter.card["template"]) for query in QUERIES]
    own = ModelConfig(base=str(folder), dtype="float32") if kind == "merged" else None
    expected = _logits(PeftModel.from_pretrained(_load_plain(model), adapter.path), rows)
    exported: Any = load_model(own) if own else PeftModel.from_pretrained(_load_plain(model), folder)
    found = _logits(exported, rows)
    difference = ((found - expected).abs().max() / expected.std()).item()
    if not difference < (limit := TOLERANCE[_stored_dtype(folder) if own else torch.float32]):
        raise AdapterError(
            f"the export computes something else than base and adapter: logits differ by {difference:.2g} of their "
            f"spread, and {limit:g} would be rounding; nothing was written"
        )
    return difference


def _load_plain(model: ModelConfig) -> Any:
    return load_model(model.model_copy(update={"dtype": "float32"}))


def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0, -1:] for row in rows]).float()


def _stored_dtype(folder: Path) -> torch.dtype:
    """The narrowest dtype among the floating-point weights of an export."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            found |= {shard.get_slice(name).get_dtype() for name in shard.keys()}  # noqa: SIM118 (not a dict)
    return torch.bfloat16 if "BF16" in found else torch.float16 if "F16" in found else torch.float32


def _read_me(adapter: Adapter, kind: str, model: ModelConfig) -> str:
    """The export's README: the published model card, and the text of one request as a client sends it."""
    file, wording = adapter.path / "README.md", PromptConfig(**adapter.card["prompt"])
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    sent = card.partition("## Prompt\n")[2].partition("\n## ")[0].strip().splitlines()
    sent = [line for line in sent if PROMPT_FILE not in line] or [f"Send the query, worded as {wording.query!r}."]
    what = "A PEFT adapter" if kind == "peft" else "The base model with the adapter in its weights"
    parts = [
        f"# {adapter.name} {adapter.version}",
        f"{what}, of the base model {adapter.card['base']}; exported by pi-ray.",
        "## Prompt\n\n" + "\n".join(sent),
    ]
    if not wording.conversation:
        encoder = PromptEncoder(load_tokenizer(model), wording)
        text = encoder.tokenizer.decode(encoder.encode(QUERIES[0], adapter.card["template"]))
        how = f"What the model reads for the query {QUERIES[0]!r}, with no chat frame of another tool around it:"
        parts.append(f"## The text of one request\n\n{how}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"
