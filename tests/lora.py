"""Tiny LoRA adapters with random weights, made with peft, as training and publishing leave them."""

from __future__ import annotations

import json
from pathlib import Path

from pi_ray.run.artifact import seal_folder, staged, write_atomic

TEMPLATE = "Answer with one code."


def card(base_model: Path | str, **changes) -> dict:
    return {
        "format": 1, "run": "tiny", "task": "colours", "base": str(base_model), "revision": "",
        "prompt": {"chat": "chatml", "query": "Q: {query}"}, "template": "",
        "full_template_sha256": "0" * 64, "full_prompt_tokens": 120, "query_prompt_tokens": 12, "max_answer_tokens": 6,
        "phase": 2, "rate": 0.0, "shots": 0,
        "fingerprint": "f" * 64, "versions": {"peft": "0"}, **changes,
    }  # fmt: skip


def write_adapter(
    folder: Path, base: Path, seed: int = 1, rank: int = 4, facts: dict | None = None, experts: bool = False
) -> Path:
    """peft's two files and pi_ray.json, without a manifest. The weights are large enough to change the greedy
    answer. With `experts` it is as pi-ray trains one with train.lora.experts.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pi_ray.config import LoraConfig as LoraSettings
    from pi_ray.train.lora import peft_config

    base_model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if experts:
        config = peft_config(base_model, LoraSettings(rank=rank, alpha=2 * rank, experts=True))
    model = get_peft_model(base_model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    write_atomic(folder / "pi_ray.json", json.dumps(facts or card(base)))
    return folder


def put_in_store(
    store: Path, name: str, base: Path, seed: int = 1, version: str = "v0001", experts: bool = False, **facts
) -> Path:
    """A published adapter without `publish`."""
    with staged(store / name / version, fingerprint=str(seed)) as tmp:
        write_adapter(tmp, base, seed, facts=card(base, **facts), experts=experts)
    write_atomic(store / name / "latest.json", json.dumps({"version": version}))
    return store / name / version


def rewrite(folder: Path, file: str, data: bytes | dict) -> None:
    """Change a file of an artifact and make its manifest agree, as someone who built a hostile adapter would."""
    (folder / file).write_bytes(json.dumps(data).encode() if isinstance(data, dict) else data)
    seal_folder(folder)
