"""LoRA on the base model (paper A.2: rank 32), and adapter folders that remember their prompt."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pi_ray.artifact import staged, write_atomic
from pi_ray.config import LoraConfig, RunConfig

CARD = "pi_ray.json"
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "llmlingua", "faiss-cpu", "sacrebleu")


def add_lora(model: Any, config: LoraConfig, seed: int) -> Any:
    """The peft model; equal seeds give equal adapters on every worker."""
    import peft

    torch.manual_seed(seed)
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    return peft.get_peft_model(model, peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, task_type="CAUSAL_LM",
    ))


def adapter_card(config: RunConfig, **facts: Any) -> dict[str, Any]:
    """What an adapter must know to be used: its base, the prompt format it was trained on, and where it comes from."""
    return {
        "format": 1,
        "run": config.name,
        "task": config.task.name,
        "base": config.model.base,
        "revision": config.model.revision,
        "prompt": config.prompt.model_dump(mode="json"),
        "versions": {p: version(p) for p in PACKAGES},
        **facts,
    }


def save_adapter(folder: Path, model: Any, weights: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
    """A plain PEFT folder (safetensors) with pi_ray.json, hashed. `weights` are full fp32 tensors by parameter name."""
    with staged(folder, fingerprint=card["fingerprint"]) as tmp:
        model.save_pretrained(tmp, state_dict=weights, safe_serialization=True)
        (tmp / "README.md").unlink(missing_ok=True)  # peft's empty model card; publish writes a real one
        write_atomic(tmp / CARD, json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
