"""What pi-ray does with each family of open models: tiny random ones of every family, trained, published and served.

    python -m tests.bench.families            print the table of docs/models.md
    python -m tests.bench.families --write    write it there
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pi_ray.config import LoraConfig
from pi_ray.run.artifact import staged
from pi_ray.serve.engine.cache_choice import create_kv_cache
from pi_ray.serve.engine.kv_cache import KVCache
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.store.verify import verify_adapter
from pi_ray.train import batch_logits, batches, lora, shared_prefix
from pi_ray.train.generation import generate_greedy
from pi_ray.train.objectives import sft_loss
from tests.lora import card, rewrite

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
SIZES: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 256,
}
WINDOW = 6  # tokens of windows and chunks, which every prompt here is longer than
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
NARROW = {"head_dim": 8}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_d_ssm": 64, "mamba_chunk_size": 8,
}
# name -> transformers' model type, and the settings of the tiny one
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3": ("llama", {}),
    "Llama 4": ("llama4_text", {
        "attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"], "head_dim": 8,
        "intermediate_size_mlp": 48, **EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
    }),
    "Mistral with a window": ("mistral", {"sliding_window": WINDOW}),
    "Ministral": ("ministral", {**NARROW, **SLIDING}),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", NARROW),
    "Qwen3-MoE": ("qwen3_moe", {**NARROW, **EXPERTS, "moe_intermediate_size": 16}),
    "Qwen3-Next": ("qwen3_next", {**DELTA, **EXPERTS, "moe_intermediate_size": 16}),
    "Qwen3.5": ("qwen3_5_text", DELTA),
    "Gemma 2": ("gemma2", {**NARROW, **SLIDING}),
    "Gemma 3": ("gemma3_text", {**NARROW, **SLIDING}),
    "Gemma 4": ("gemma4_text", {**NARROW, **SLIDING}),
    "gpt-oss": ("gpt_oss", {**NARROW, **EXPERTS, **SLIDING}),
    "Phi-3, Phi-4": ("phi3", {}),
    "SmolLM3": ("smollm3", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", SLIDING),
    "Granite 3": ("granite", {}),
    "Granite 4": ("granitemoehybrid", {**MAMBA, **EXPERTS, "layer_types": ["mamba", "attention"]}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "DeepSeek-V3": ("deepseek_v3", {**EXPERTS, **LATENT}),
    "GLM-4": ("glm4", NARROW),
    "GLM-4-MoE": ("glm4_moe", {**NARROW, **EXPERTS, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}),
    "Cohere2": ("cohere2", SLIDING),
    "Nemotron-H": ("nemotron_h", {
        **EXPERTS, "hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "head_dim": 8, "chunk_size": 8,
    }),
    "Falcon-H1": ("falcon_h1", {**MAMBA, **NARROW}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-2": ("gpt2", {}),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {}),
    "Bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Mamba": ("mamba", {"state_size": 4}),
}
PREFIX = [(7 * i) % 190 + 5 for i in range(14)]
PHASES = (PREFIX, PREFIX[:7], [])  # the template's tokens in each phase
ROWS = [([11, 12, 13, 14, 15], [21, 22, 23]), ([31, 32, 33], [41, 42, 43, 44]), ([51, 52, 53, 54, 55, 56], [61, 1])]
PROMPTS = [list(range(20, 42)), [7, 8, 9], list(range(100, 113))]
NEW_TOKENS = 8
TOLERANCE = 1e-3  # relative, of losses and gradients


@dataclass(frozen=True)
class Findings:
    """What was found of one family. `shared`: how rows share their prefix in training, or why not."""

    family: str
    shared: str
    served: str
    layers: tuple[str, ...]


def tiny_model(model_type: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def gradients(model: Any, pack: batches.Pack, prefix: list[int]) -> tuple[float, torch.Tensor]:
    """(loss, gradient of all trainable weights) of ROWS behind `prefix`."""
    model.eval().zero_grad(set_to_none=True)  # without dropout
    loss = sft_loss(model, pack(prefix, ROWS))
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in lora.trainable_parameters(model).values()]
    return loss.item(), torch.cat([grad.flatten() for grad in grads])


def train(model: Any, longest: int) -> str:
    """Train through three phases, comparing shared with plain batches in each; how rows share their prefix, or why not.
    """
    pack: batches.Pack = batches.plain_batch
    own = model.get_base_model().config._attn_implementation
    reason = shared_prefix.why_prefix_cannot_be_shared(model.get_base_model())
    reason = reason or batch_logits.packing_error(model, "cpu", flex=False, longest=longest)
    shared = "no" if reason else "packed"
    if not reason:
        pack = batches.packed_batch
    elif why := batch_logits.suffix_error(model, "cpu", longest):
        shared = f"no: {reason}, and {why}"
    else:
        pack, shared = batches.suffix_batch, f"by its cache: {reason}"
    packed = model.get_base_model().config._attn_implementation
    untrained, _ = gradients(model, pack, PHASES[-1])
    optimizer = torch.optim.AdamW(lora.trainable_parameters(model).values(), lr=0.02)
    for phase, prefix in enumerate(PHASES):
        model.get_base_model().set_attn_implementation(own)
        plain_loss, plain = gradients(model, batches.plain_batch, prefix)
        model.get_base_model().set_attn_implementation(packed)
        if pack is not batches.plain_batch:
            loss, found = gradients(model, pack, prefix)
            difference = ((found - plain).norm() / plain.norm()).item()
            assert abs(loss - plain_loss) < TOLERANCE * plain_loss, f"phase {phase}: loss {loss} against {plain_loss}"
            assert difference < TOLERANCE, f"phase {phase}: gradients differ by {difference}"
        for _ in range(2):
            gradients(model, pack, prefix)
            optimizer.step()
    assert gradients(model, pack, PHASES[-1])[0] < untrained, "training does not learn"
    return shared


@torch.inference_mode()
def alone(model: Any, prompt: Sequence[int]) -> list[int]:
    """Greedy tokens without any cache."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row


@torch.inference_mode()
def together(cache: Any, slot: int) -> list[list[int]]:
    """Greedy tokens of all prompts in one running batch."""
    cache.add_rows(len(PROMPTS))
    logits = cache.forward(0, PROMPTS, [slot] * len(PROMPTS))
    found = [[int(row.argmax())] for row in logits]
    while len(found[0]) < NEW_TOKENS:
        logits = cache.forward(0, [[row[-1]] for row in found], [slot] * len(PROMPTS))
        for row, after in zip(found, logits, strict=True):
            row.append(int(after.argmax()))
    for _ in PROMPTS:
        cache.pop_row()
    return found


@torch.inference_mode()
def resumed(cache: Any, slot: int) -> list[list[int]]:
    """The same of one prompt after the other, each read but for two tokens, gone, and taken from a copy again, as by
    the prefix cache.
    """
    found = []
    for prompt in PROMPTS:
        cache.add_rows(1)
        cache.forward(0, [prompt[:-2]], [slot])
        block, states = cache.copy_block(0, 0, len(prompt) - 2), cache.copy_states(0)
        cache.pop_row()
        cache.add_rows(1)
        cache.load_blocks(0, [block], states)
        row = [int(cache.forward(0, [prompt[-2:]], [slot])[0].argmax())]
        while len(row) < NEW_TOKENS:
            row.append(int(cache.forward(0, [row[-1:]], [slot])[0].argmax()))
        cache.pop_row()
        found.append(row)
    return found


def examine(family: str, folder: Path) -> Findings:
    """Train, publish and serve a tiny model of this family. Raises AssertionError where a step computes what it should
    not.
    """
    model_type, settings = FAMILIES[family]
    base = tiny_model(model_type, settings)
    model = lora.add_lora(copy.deepcopy(base), LoraConfig(rank=4), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    shared = train(model, len(PREFIX) + max(len(prompt) + len(label) for prompt, label in ROWS))
    model.get_base_model().set_attn_implementation("sdpa" if base.config._attn_implementation == "sdpa" else "eager")
    expected = [alone(model, prompt) for prompt in PROMPTS]
    head, rows = PROMPTS[0][:10], [PROMPTS[0][10:], [7, 8, 9], [60, 61, 62], [9, 8, 7]]  # some of equal length
    generated = generate_greedy(model, head, rows, NEW_TOKENS, end=None)
    assert generated == [alone(model, [*head, *row]) for row in rows], "evaluation answers otherwise"
    stopped = generate_greedy(model, head, rows, NEW_TOKENS, end=generated[2][1])
    assert stopped == [until(row, generated[2][1]) for row in generated], "rows that end early change others"
    with staged(folder / "adapter", fingerprint="x") as tmp:
        model.save_pretrained(tmp)
        (tmp / "README.md").unlink(missing_ok=True)
    rewrite(folder / "adapter", "pi_ray.json", card("tiny"))
    verify_adapter(folder / "adapter")
    served = MultiLora(base, 1)
    slot = served.load(str(folder / "adapter"))
    cache = create_kv_cache(base, served)
    found = together(cache, slot)
    assert found == expected, f"served {found}, and by itself it is {expected}"
    assert not cache.keeps_blocks or resumed(cache, slot) == expected, "behind a cached prefix it answers otherwise"
    merged = tiny_model(model_type, settings)
    MultiLora(merged, 1).merge(str(folder / "adapter"))
    assert [alone(merged, prompt) for prompt in PROMPTS] == expected, "merged into the base it answers otherwise"
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    batched = "in batches, with a prefix cache" if cache.keeps_blocks else "in batches"
    served = batched if isinstance(cache, KVCache) else "row by row"
    return Findings(family, shared, served, tuple(sorted(names)))


def table(found: Sequence[Findings]) -> str:
    """The Markdown table of docs/models.md."""
    lines = ["| Family | Rows share their prefix in training | Served | LoRA on |", "| --- | --- | --- | --- |"]
    for each in found:
        shared = re.sub(r" \([^)]*apart\)", "", each.shared)  # a number that machines round in other ways
        lines.append(f"| {each.family} | {shared} | {each.served} | {', '.join(each.layers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(examine(family, Path(folder)))
    text = table(found)
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
    else:
        print(text)


if __name__ == "__main__":
    main()
