"""Everything that a GPU changes, on one card in under 8 minutes.

    python -m tests.bench.gpu [--only flex,deepspeed] [--model smollm2-135m]

Each part runs in a process of its own; one that fails, or takes longer than it may, does not stop the others. Without
a GPU it says so and ends well. Parts:

    flex        loss and gradients of packed rows in bfloat16 by flex attention and by SDPA, against plain batches
    quantize    a base in 4 bits: its loss against bfloat16's, and its memory
    deepspeed   training through NCCL with one worker at ZeRO stages 2 and 3, losses against plain data parallelism
    evaluate    greedy answers on the card against the CPU's in float32, and tokens a second
    latency     a request with and without the prefix's cache, synchronised and warmed up
    serve       the engine `transformers` with 16 requests at once, answers against one at a time
    vllm        greedy answers of vLLM against transformers', where it is installed
    trainers    tests.bench.train on synthetic rows: tokens a second and memory beside HF Trainer and TRL

The last line has `ran`, `parts`, and each part's figures as PART_NAME.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pi_ray.config import LoraConfig, ModelConfig, ServeConfig
from pi_ray.models import load_model, load_tokenizer
from pi_ray.models.base_files import resolve_base
from tests.bench.report import header, last_line

SECONDS = 90  # of a part, at most; all parts together stay below 8 minutes
ROWS, PREFIX, QUERY, ANSWER = 16, 480, 40, 18
GIB = 2**30
Figures = dict[str, float]


def synthetic_rows(base: str) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """A prefix, and (prompt, label) of rows: random tokens."""
    rng, vocabulary = random.Random(0), len(load_tokenizer(ModelConfig(base=base)))

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocabulary // 50, vocabulary) for _ in range(count)]

    return ids(PREFIX), [(ids(QUERY + i % 7), ids(ANSWER)) for i in range(ROWS)]


def share_of_equal(right: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    """Of the tokens in `right`, those that `found` has at the same place; it may have more answers."""
    pairs = [pair for x, y in zip(right, found, strict=False) for pair in zip(x, y, strict=False)]
    return sum(a == b for a, b in pairs) / sum(map(len, right))


def adapted(base: str, device: str, **settings: Any) -> Any:
    """A base with an adapter whose B matrices are not zero."""
    from pi_ray.train import lora

    settings = {"base": base, "dtype": "bfloat16", **settings}
    model = lora.add_lora(load_model(ModelConfig(**settings), device), LoraConfig(), seed=0)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return model.train()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_step(model: Any, batch: Any) -> tuple[float, float, torch.Tensor]:
    """(seconds, mean loss, gradients) of a forward and a backward pass."""
    from pi_ray.train import lora
    from pi_ray.train.objectives import sft_loss

    model.zero_grad(set_to_none=True)
    synchronize(batch.labels.device)
    started = time.perf_counter()
    loss = sft_loss(model, batch) / (batch.labels >= 0).sum()
    loss.backward()
    synchronize(batch.labels.device)
    seconds = time.perf_counter() - started
    return seconds, loss.item(), torch.cat([p.grad.flatten() for p in lora.trainable_parameters(model).values()])


def flex(base: str, device: str) -> Figures:
    from pi_ray.train import shared_prefix
    from pi_ray.train.batches import packed_batch, plain_batch, to_device

    model, (prefix, rows) = adapted(base, device), synthetic_rows(base)
    packed, plain = (to_device(make(prefix, rows), device) for make in (packed_batch, plain_batch))
    found: dict[str, list[tuple[float, float, torch.Tensor]]] = {"plain": [], "sdpa": [], "flex": []}
    for name in found:
        if name == "plain":
            model.set_attn_implementation("sdpa")
        else:
            shared_prefix.enable_shared_prefix(model, flex=name == "flex")
        found[name] = [timed_step(model, plain if name == "plain" else packed) for _ in range(6)]
    seconds = {name: median(s for s, _, _ in steps[2:]) for name, steps in found.items()}
    (_, loss, right), figures = found["plain"][-1], Figures()
    for name in ("sdpa", "flex"):
        _, own_loss, own = found[name][-1]
        figures[f"{name}_speedup"] = seconds["plain"] / seconds[name]
        figures[f"{name}_loss_difference"] = abs(own_loss - loss) / loss
        figures[f"{name}_gradient_difference"] = float((own.float() - right.float()).norm() / right.float().norm())
        assert figures[f"{name}_loss_difference"] < 0.02, figures
    return {**figures, "token_ratio": packed.plain_tokens / packed.tokens}


def quantize(base: str, device: str) -> Figures:
    from pi_ray.train.batches import plain_batch, to_device

    prefix, rows = synthetic_rows(base)
    batch, losses, memory = to_device(plain_batch(prefix, rows[:4]), device), {}, {}
    for name, settings in {"bfloat16": {}, "4bit": {"quantize": "4bit"}}.items():
        before = torch.cuda.memory_allocated()
        model = adapted(base, device, **settings)
        memory[name] = torch.cuda.memory_allocated() - before
        losses[name] = timed_step(model, batch)[1]
        del model
        torch.cuda.empty_cache()
    return {"loss_difference": losses["4bit"] / losses["bfloat16"] - 1, "memory": memory["4bit"] / memory["bfloat16"]}


def deepspeed(base: str, device: str) -> Figures:
    import torch.distributed as dist

    from pi_ray.train.train_log import read_entries
    from pi_ray.train.trainer import Trainer
    from tests.prepared import prepare_by_hand, tiny_config

    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kind = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(kind, init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name, backend in {
            "ddp": {"name": "ddp"}, "zero2": {"name": "deepspeed", "zero_stage": 2},
            "zero3": {"name": "deepspeed", "zero_stage": 3},
        }.items():
            root = Path(folder) / name
            config = tiny_config(Path(base), root, **{
                "model.base": base, "train.backend": backend, "train.gpu": device != "cpu", "train.lr": 0.001,
                "train.attention": "sdpa",
            })
            prepare_by_hand(config)
            worker = Trainer(config, "gpu", device, None)
            for update in worker.updates[:3]:
                worker.train_step(update)
            entries = read_entries((root / "train.jsonl").read_bytes())
            losses[name] = [entry["loss"] for entry in entries if "loss" in entry]
            worker.close()
        dist.destroy_process_group()
    figures = {}
    for name in ("zero2", "zero3"):
        apart = max(abs(a - b) / b for a, b in zip(losses[name], losses["ddp"], strict=True))
        assert apart < 0.05, losses
        figures[f"{name}_loss_difference"] = apart
    return figures


def evaluate(base: str, device: str) -> Figures:
    from pi_ray.train.generation import generate_greedy

    prefix, rows = synthetic_rows(base)
    prompts, answers = [prompt for prompt, _ in rows], {}
    for side, where, dtype in (("cpu", "cpu", "float32"), ("card", device, "float32"), ("half", device, "bfloat16")):
        model = load_model(ModelConfig(base=base, dtype=dtype), where)
        few = prompts[:4] if side == "cpu" else prompts
        generate_greedy(model, prefix, few[:1], 2, None)
        started = time.perf_counter()
        answers[side] = generate_greedy(model, prefix, few, 24, None)
        seconds = time.perf_counter() - started
    same = share_of_equal(answers["cpu"], answers["card"])
    assert same >= 0.9, f"{same:.0%} of the tokens are the CPU's"
    return {"tokens_as_on_cpu": same, "tokens_per_second": 24 * len(prompts) / seconds}


def latency(base: str, device: str) -> Figures:
    from pi_ray.train.generation import compute_prefix_cache, request_seconds

    model, (prefix, rows) = load_model(ModelConfig(base=base), device), synthetic_rows(base)
    cache = compute_prefix_cache(model, prefix)
    request_seconds(model, prefix, rows[0][0], 16)
    whole, cached, alone = (
        median(request_seconds(model, head, prompt, 16, kept) for prompt, _ in rows[:8])
        for head, kept in ((prefix, None), (prefix, cache), ([], None))
    )
    return {"full_prompt_s": whole, "cached_over_full": cached / whole, "query_over_full": alone / whole}


def serve(base: str, device: str) -> Figures:
    from pi_ray.protocols import GenerationRequest
    from pi_ray.serve.engine.engine import TransformersEngine

    engine = TransformersEngine(ModelConfig(base=base), ServeConfig(max_ongoing_requests=16))
    prompts, tokens = [prompt for prompt, _ in synthetic_rows(base)[1]], 48

    async def answer(prompt: list[int]) -> list[int]:
        return [token.id async for token in engine.generate(GenerationRequest(prompt, tokens))]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*map(answer, prompts))

    one = [asyncio.run(answer(prompt)) for prompt in prompts[:2]]
    started = time.perf_counter()
    found = asyncio.run(together())
    seconds = time.perf_counter() - started
    engine.close()
    return {"tokens_as_alone": share_of_equal(one, found), "tokens_per_second": sum(map(len, found)) / seconds}


def vllm(base: str, device: str) -> Figures:
    from vllm import LLM, SamplingParams

    from pi_ray.train.generation import generate_greedy

    prompts = [prompt for prompt, _ in synthetic_rows(base)[1][:4]]
    model = load_model(ModelConfig(base=base), device)
    right = [answer for prompt in prompts for answer in generate_greedy(model, [], [prompt], 16, None)]
    del model
    torch.cuda.empty_cache()
    engine = LLM(resolve_base(base), dtype="bfloat16", max_model_len=1024, gpu_memory_utilization=0.5)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = engine.generate(asked, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    return {"tokens_as_transformers": share_of_equal(right, [each.outputs[0].token_ids for each in found])}


def trainers(base: str, device: str) -> Figures:
    rng, words = random.Random(0), ["list", "find", "move", "copy", "count", "print", "sort", "files", "lines", "logs"]
    with tempfile.TemporaryDirectory() as folder:
        for split, count in {"train": 400, "dev": 40, "test": 40}.items():
            asked = [" ".join(rng.choices(words, k=9)) + f" {i}" for i in range(count)]
            (Path(folder) / f"{split}.nl").write_text("\n".join(asked) + "\n")
            answers = [f"find . -name '{query.split()[0]}*'" for query in asked]
            (Path(folder) / f"{split}.cm").write_text("\n".join(answers) + "\n")
        options = ["--data", folder, "--model", base, "--dtype", "bfloat16", "--updates", "4"]
        command = [sys.executable, "-m", "tests.bench.train", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


PARTS: dict[str, Callable[[str, str], Figures]] = {
    part.__name__: part for part in (flex, quantize, deepspeed, evaluate, latency, serve, vllm, trainers)
}


def run_part(name: str, base: str) -> tuple[Figures | None, str]:
    """(its figures, or None and why)."""
    command = [sys.executable, "-m", "tests.bench.gpu", "--part", name, "--model", base]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"took longer than {SECONDS} s"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no reason"])[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.model, "cuda")))
        return
    asked = args.only.split(",")
    if unknown := set(asked) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    header("what a GPU changes")
    if not torch.cuda.is_available():
        print(f"  there is no GPU here: 0 of {len(asked)} ran")
        last_line(ran=0, parts=len(asked))
        return
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    print(f"  {torch.cuda.get_device_name()}, {total:.0f} GiB", flush=True)
    figures, ran = Figures(), 0
    for name in asked:
        found, why = run_part(name, args.model)
        if found is None:
            print(f"  {name:10} failed: {why}", flush=True)
            continue
        ran += 1
        print(f"  {name:10} " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    print(f"  {ran} of {len(asked)} ran")
    last_line(**figures, ran=ran, parts=len(asked))


if __name__ == "__main__":
    main()
