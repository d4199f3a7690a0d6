"""LoRA (paper A.2: rank 32) or another of peft's methods on the base model, and adapter folders that remember their prompt."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pi_ray.config import LoraConfig, RunConfig
from pi_ray.errors import ConfigError, TrainingError
from pi_ray.run.artifact import digest, staged, verify, write_atomic
from pi_ray.run.directory import RunDir
from pi_ray.train import gist
from pi_ray.train.deepspeed_settings import moe_blocks

CARD = "pi_ray.json"
ALL_LINEAR = "all-linear"
SCALE = ("lora_alpha", "use_rslora", "init_lora_weights")  # what matrices of one shape count for, and beside which base weights, in adapter_config.json
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "llmlingua", "faiss-cpu", "sacrebleu")


def add_lora(model: Any, config: LoraConfig, seed: int) -> Any:
    """The peft model; equal seeds give equal adapters on every worker."""
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)  # peft's own, made for fused experts that are not adapted
        return peft.get_peft_model(model, peft_config(model, config))


def peft_config(model: Any, config: LoraConfig) -> Any:
    """peft's configuration of `train.lora.method` for this base model. Raises ConfigError when it has no such places."""
    import peft

    named = config.targets if isinstance(config.targets, str) else list(config.targets)
    if config.method == "ia3":
        places = {} if named == ALL_LINEAR else {"target_modules": named, "feedforward_modules": []}
        return peft.IA3Config(**places, task_type="CAUSAL_LM")
    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, task_type="CAUSAL_LM",
        target_modules=_attention(model) if named == ALL_LINEAR and moe_blocks(model) else named, target_parameters=_experts(model) if config.experts else None,
        use_rslora=config.method == "rslora", use_dora=config.method == "dora", init_lora_weights="pissa" if config.method == "pissa" else True,
    )


def _attention(model: Any) -> list[str]:
    """Attention's linear layers, as "self_attn.q_proj". Of a mixture of experts peft's own all-linear would take the experts and the router too."""
    parts = [name.split(".") for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return sorted({".".join(p[-2:]) for p in parts if len(p) > 1 and "att" in p[-2]})


def _experts(model: Any) -> list[str]:
    """The fused weights (experts, out, in) of a mixture of experts, as "experts.down_proj"."""
    weights = [(name, getattr(p, "ds_shape", p.shape)) for block in moe_blocks(model) for name, p in block.experts.named_parameters(recurse=False)]
    found = sorted({f"experts.{name}" for name, shape in weights if len(shape) == 3})
    if not found:
        raise ConfigError("train.lora.experts: this base model has no fused experts; leave it out")
    return found


def start(model: Any, config: LoraConfig) -> dict[str, torch.Tensor]:
    """The matrices that pissa starts from and has taken out of the base weights (A0, B0), by parameter name; none for other methods."""
    return {name: p.detach().float().cpu().clone() for name, p in trainable(model).items()} if config.method == "pissa" else {}


def adapter_card(config: RunConfig, phases: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """What an adapter must know to be used: its base, the prompt format it was trained on, and where it comes from. `phases` are the datasets' manifests."""
    first, last, gists = phases[0], phases[-1], config.train.gist
    return {
        "format": 1,
        "run": config.name,
        "task": config.task.name,
        "base": config.model.base,
        "revision": config.model.revision,
        "prompt": config.prompt.model_dump(mode="json"),
        "versions": {p: version(p) for p in PACKAGES},
        "rate": last["phase"]["rate"],
        "shots": last["phase"]["shots"],
        "template": last["template"],
        "full_template_sha256": digest(first["template"]),
        "full_prompt_tokens": round(first["tokens"]["prefix"] + first["tokens"]["row_mean"]),
        "query_prompt_tokens": round((gists or last["tokens"]["prefix"]) + last["tokens"]["row_mean"]),
        "max_answer_tokens": int(last["tokens"]["label_max"]),
        **({"gist": gists} if gists else {}),
        **facts,
    }


def save_adapter(folder: Path, model: Any, weights: dict[str, torch.Tensor], card: dict[str, Any], started: dict[str, torch.Tensor] | None = None) -> None:
    """A plain PEFT folder (safetensors) with pi_ray.json, and gist embeddings if there are any, hashed. `weights` are full fp32 tensors by parameter name.

    `started` is what `start` gave: the difference to it is saved, which fits the base model as it was.
    """
    with staged(folder, fingerprint=card["fingerprint"]) as tmp:
        model.save_pretrained(tmp, state_dict={name: _difference(name, value, started) if started else value for name, value in weights.items()}, safe_serialization=True)
        if started:
            file = tmp / "adapter_config.json"
            saved = json.loads(file.read_text())
            write_atomic(file, json.dumps({**saved, "r": 2 * saved["r"], "lora_alpha": 2 * saved["lora_alpha"], "init_lora_weights": True}, indent=1) + "\n")
        gist.save(tmp, weights)
        (tmp / "README.md").unlink(missing_ok=True)  # peft's empty model card; publish writes a real one
        write_atomic(tmp / CARD, json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _difference(name: str, value: torch.Tensor, started: dict[str, torch.Tensor]) -> torch.Tensor:
    """B A - B0 A0 as one product of twice the rank: [B, -B0] [A; A0]."""
    if ".lora_A." in name:
        return torch.cat([value, started[name]], 0)
    return torch.cat([value, -started[name]], 1) if ".lora_B." in name else value


def weights_of(folder: Path, model: Any, base: str) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder by `model`'s parameter names, in fp32. Raises CorruptArtifactError, or TrainingError when it is of another base, shape or scale."""
    from safetensors.torch import load_file

    verify(folder)
    card = json.loads((folder / CARD).read_text())
    if card["base"] != base:
        raise TrainingError(f"train.init_adapter: {folder} was trained on {card['base']}, and model.base is {base}")
    found = {f"{name.removesuffix('.weight')}.default.weight": value.float() for name, value in load_file(folder / "adapter_model.safetensors").items()}
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trainable(model).items()}
    saved, own = json.loads((folder / "adapter_config.json").read_text()), model.peft_config["default"]
    if {name: tuple(value.shape) for name, value in found.items()} != wanted or any(saved.get(key) != getattr(own, key, None) for key in SCALE):
        raise TrainingError(f"train.init_adapter: {folder} does not fit train.lora: take its method, rank, alpha and targets")
    return found


def mark_best(run: RunDir, phases: int) -> tuple[int, float]:
    """Link `best` to the phase adapter with the highest dev accuracy (the later one of equals). Returns phase and accuracy.

    Not the lowest loss: an adapter that has learned more is surer of what it cannot know, and a few such answers outweigh all the others.
    """
    accuracies = [json.loads((run.adapter(i) / CARD).read_text())["dev_accuracy"] for i in range(phases)]
    best = max(range(phases), key=lambda i: (accuracies[i], i))
    link = run.adapters / ".best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(run.adapter(best).name)
    os.replace(link, run.best)
    return best, accuracies[best]


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
