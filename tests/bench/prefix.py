"""Shared-prefix batches against plain padded batches: the same rows, model, loss and gradients.

    python -m tests.bench.prefix [--model smollm2-135m|sliding|hybrid] [--rounds 5] [--dtype bfloat16]

The peer is the padded batch that trainers commonly use, given the same advantages: SDPA attention and logits at the
answer's tokens alone. Both are timed alternately, forward and backward, and the median is taken. `token_ratio` is the
tokens that each row with a prefix of its own would have over those that pass through the model. `sliding` and `hybrid`
are random models of Gemma 3's and Qwen3.5's kind, whose rows are packed, and go on from the prefix's cache. In bfloat16
on a CPU packed rows are timed with torch's backward pass of SDPA too, in place of pi-ray's own: `backward_speedup`.
Memory is what an update takes beyond model and optimiser: how far the process, or the GPU, grows at most.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.models import load_model
from pi_ray.train import cpu_attention, lora, shared_prefix
from pi_ray.train.batch_logits import packing_error, suffix_error
from pi_ray.train.batches import Batch, Pack, packed_batch, plain_batch, suffix_batch, to_device
from pi_ray.train.objectives import sft_loss
from tests.bench.report import header, last_line

# name, rows, prefix, query, answer
CASES = [
    ("shots and template", 8, 200, 45, 15), ("long template", 8, 550, 100, 18), ("short rows", 16, 480, 25, 18),
    ("many rows", 16, 480, 40, 18),
]
SHAPE: dict[str, Any] = {
    "vocab_size": 49_152, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}
MADE: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model type and settings of a random model
    "sliding": ("gemma3_text", {
        "sliding_window": 128, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    }),
    "hybrid": ("qwen3_5_text", {
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3, "linear_num_key_heads": 8,
        "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }),
}


def step(model: torch.nn.Module, batch: Batch) -> tuple[float, float, torch.Tensor]:
    """(seconds, mean loss, gradient of all trainable weights)."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    loss = sft_loss(model, batch) / (batch.labels >= 0).sum()
    loss.backward()
    seconds = time.perf_counter() - started
    return seconds, loss.item(), torch.cat([p.grad.flatten() for p in lora.trainable_parameters(model).values()])


def torchs_backward_step(model: torch.nn.Module, batch: Batch) -> float:
    """Seconds of `step` without pi-ray's own backward pass of attention."""
    most, cpu_attention.MOST = cpu_attention.MOST, 0
    try:
        return step(model, batch)[0]
    finally:
        cpu_attention.MOST = most


def memory_of(model: torch.nn.Module, batch: Batch) -> float:
    """MiB that a `step` takes at its peak, beyond what was there before."""
    if batch.labels.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, batch)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    model.zero_grad(set_to_none=True)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    step(model, batch)
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    """KiB that the kernel counts for this process."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def load(name: str, dtype: str, device: str) -> Any:
    """A model by name, or a random one of MADE."""
    if name not in MADE:
        return load_model(ModelConfig(base=name, dtype=dtype), device)
    model_type, settings = MADE[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SHAPE, **settings}))
    return model.to(device, getattr(torch, dtype)).requires_grad_(False)


def measure(
    model: torch.nn.Module, case: tuple[str, int, int, int, int], rounds: int, pack: Pack
) -> tuple[float, float, float, float, float]:
    """(speedup, token ratio, relative difference of gradients, speedup by the own backward pass, plain memory over
    shared memory) of a case.
    """
    name, rows, prefix, query, answer = case
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(100, 40000) for _ in range(n)]

    head, data = (
        ids(prefix), [(ids(query + rng.randrange(-5, 6)), ids(answer + rng.randrange(-2, 3))) for _ in range(rows)],
    )
    shared, padded = (to_device(make(head, data), str(model.device)) for make in (pack, plain_batch))
    packed = pack is packed_batch
    times: dict[str, list[float]] = {"shared": [], "plain": [], "torch's backward": []}
    for i in range(rounds + 1):
        model.set_attn_implementation("sdpa")
        plain_s, plain_loss, expected = step(model, padded)
        if packed:
            shared_prefix.enable_shared_prefix(model)
        shared_s, shared_loss, found = step(model, shared)
        torchs_s = torchs_backward_step(model, shared) if packed else shared_s
        if i:  # the first round warms up
            times["torch's backward"].append(torchs_s)
            times["plain"].append(plain_s)
            times["shared"].append(shared_s)
    memory = {"shared": memory_of(model, shared)}
    model.set_attn_implementation("sdpa")
    memory["plain"] = memory_of(model, padded)
    speedup, ratio = median(times["plain"]) / median(times["shared"]), shared.plain_tokens / shared.tokens
    backward = median(times["torch's backward"]) / median(times["shared"])
    difference = float((found.float() - expected.float()).norm() / expected.float().norm())
    print(f"  {name}: {rows} rows of {prefix} + {query} + {answer} tokens")
    for side, loss, tokens in (("plain", plain_loss, padded.plain_tokens), ("shared", shared_loss, shared.tokens)):
        taken = f"{median(times[side]):7.2f} s  {memory[side]:6,.0f} MiB"
        print(f"    {side:7} median {taken}  loss {loss:.6f}  {tokens} tokens")
    if packed and model.dtype == torch.bfloat16 and model.device.type == "cpu":
        spread = f"{min(times['shared']):.2f} to {max(times['shared']):.2f}"
        print(f"    shared with torch's backward pass {backward:.2f} times as long (shared alone took {spread} s)")
    print(
        f"    speedup {speedup:.2f}, token ratio {ratio:.2f}, gradients differ by {difference:.1e} (relative)",
        flush=True,
    )
    return speedup, ratio, difference, backward, memory["plain"] / memory["shared"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    header(f"shared prefix against plain batches, {args.model}, {args.dtype}, LoRA rank 32, forward and backward")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = lora.add_lora(load(args.model, args.dtype, device), LoraConfig(), seed=0).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave half of the gradients zero
            torch.nn.init.normal_(p, std=0.01)
    pack: Pack = packed_batch
    if reason := shared_prefix.why_prefix_cannot_be_shared(model.get_base_model()) or packing_error(
        model, device, flex=False, longest=640
    ):
        why = suffix_error(model, device, longest=640)
        print(f"  plain batches: {why}" if why else f"  rows go on from the prefix's cache, since {reason}", flush=True)
        pack = suffix_batch
    results = [measure(model, case, args.rounds, pack) for case in CASES]
    # the case that stands worst against its token ratio is the one reported
    worst = min(results, key=lambda r: r[0] / r[1])
    timed = pack is packed_batch and args.dtype == "bfloat16" and device == "cpu"
    own = {"backward_speedup": min(r[3] for r in results)} if timed else {}
    last_line(
        speedup=worst[0], token_ratio=worst[1], grad_rel_diff=max(r[2] for r in results),
        memory_ratio=min(r[4] for r in results), **own,
    )


if __name__ == "__main__":
    main()
