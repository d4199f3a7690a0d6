"""Loading a mixture of experts under ZeRO-3: host memory of all ranks of a machine, and seconds.

    python -m tests.bench.load [--gib 2] [--ranks 2 4]

A synthetic Mixtral in bfloat16, as safetensors in the hub's layout (experts one by one), is loaded by pi-ray's backend
and by transformers in the way of scripts that call `deepspeed.initialize` on a loaded model: `from_pretrained` on every
rank. Memory is PSS (shared pages are divided among those that share them), every 20 ms over all ranks of a side; file
pages are those of the mapped checkpoint, which the system can drop at any time. The shards themselves are host memory
too here, without a GPU. The bound is that of issue and plan: 1.3 times the checkpoint and 2 GiB a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.report import header, last_line

GIB = 2**30
HIDDEN, INNER, EXPERTS, HEADS, KV_HEADS, VOCABULARY = 1024, 3584, 8, 16, 4, 32_000
WAYS = {"pi_ray": "pi-ray (ZeRO-3 while loading)", "whole": "transformers, then deepspeed.initialize"}
SAMPLE_S = 0.02


def write_checkpoint(folder: Path, gib: float) -> int:
    """Random weights, a file a layer, so that no more than one layer is in memory; returns bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    layer_bytes = 2 * (3 * EXPERTS * HIDDEN * INNER + 2 * HIDDEN**2 + 2 * HIDDEN**2 * KV_HEADS // HEADS)
    layers = max(1, round(gib * GIB / layer_bytes))
    MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_local_experts=EXPERTS, dtype="bfloat16",
        architectures=["MixtralForCausalLM"], tie_word_embeddings=False,
    ).save_pretrained(folder)

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(std=0.02)

    tables = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN), "lm_head.weight": weight(VOCABULARY, HIDDEN)}
    index, size = {}, 0
    for i in range(-1, layers):
        at, key_values = f"model.layers.{i}", HIDDEN * KV_HEADS // HEADS
        tensors = {**tables, "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)} if i < 0 else {
            **{f"{at}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)
               for name in ("input_layernorm", "post_attention_layernorm")},
            **{f"{at}.self_attn.{name}_proj.weight": weight(rows, HIDDEN)
               for name, rows in (("q", HIDDEN), ("k", key_values), ("v", key_values), ("o", HIDDEN))},
            f"{at}.block_sparse_moe.gate.weight": weight(EXPERTS, HIDDEN),
            **{f"{at}.block_sparse_moe.experts.{e}.{name}.weight": weight(*shape)
               for e in range(EXPERTS)
               for name, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN)))},
        }
        name = f"model-{i + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    return size


def load(way: str, folder: str, rank: int, ranks: int, meeting: str) -> dict[str, float]:
    """One rank of one side, in a process of its own: {seconds, and a sum over the weights that this rank holds}."""
    import torch
    import torch.distributed as dist

    from pi_ray.config import RunConfig
    from pi_ray.models import load_model
    from pi_ray.train.backends import DeepSpeedBackend, deepspeed_config
    from pi_ray.train.lora import add_lora, trainable_parameters

    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    config = RunConfig(name="large").replace(**{
        "model.base": folder, "model.dtype": "bfloat16", "train.workers": ranks, "train.batch_size": ranks,
        "train.backend": {"name": "deepspeed", "zero_stage": 3},
    })
    import deepspeed

    def build() -> Any:
        return add_lora(load_model(config.model), config.train.lora, 0)

    dist.barrier()
    began = time.monotonic()
    if way == "pi_ray":
        model = DeepSpeedBackend(build, config.train, bf16=True).model
    else:
        model = build()
        settings = deepspeed_config(config.train, ranks, 1, True)
        trained = list(trainable_parameters(model).values())
        options = {"model_parameters": trained, "config": settings, "dist_init_required": False}
        model = deepspeed.initialize(model=model, **options)[0]
    seconds = time.monotonic() - began
    held = sum(float(p.ds_tensor.float().abs().sum()) for n, p in model.named_parameters() if "lora" not in n)
    dist.barrier()
    return {"seconds": seconds, "held": held}


def pss(process: int) -> tuple[float, float]:
    """(all, of them pages of files) in bytes."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0, 0.0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return float(sizes.get("Pss", 0)), float(sizes.get("Pss_File", 0))


def measure(way: str, folder: Path, ranks: int) -> dict[str, float]:
    """Peaks over all ranks together, and the seconds of the slowest one."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "tests.bench.load", "--way", way, "--folder", str(folder)]
        command += ["--meeting", f"{temporary}/store", "--ranks", str(ranks), "--rank"]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        peak = largest = without_files = 0.0
        while any(p.poll() is None for p in processes):
            held = [pss(p.pid) for p in processes]
            peak, largest = max(peak, sum(a for a, _ in held)), max(largest, *(a for a, _ in held))
            without_files = max(without_files, sum(a - f for a, f in held))
            time.sleep(SAMPLE_S)
        said = [p.communicate() for p in processes]
        for process, (_, errors) in zip(processes, said, strict=True):
            if process.returncode:
                raise RuntimeError(f"a rank failed:\n{errors[-2000:]}")
        found = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return {
        "gib": peak / GIB, "gib_without_files": without_files / GIB, "gib_of_largest": largest / GIB,
        "seconds": max(f["seconds"] for f in found), "held": sum(f["held"] for f in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="of the checkpoint; default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    for name, kind in (("--way", str), ("--folder", str), ("--meeting", str), ("--rank", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # of one rank, which `measure` starts
    args = parser.parse_args()
    if args.way:
        print(json.dumps(load(args.way, args.folder, args.rank, args.ranks[0], args.meeting)))
        return
    header("loading a mixture of experts under ZeRO-3")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        size = write_checkpoint(Path(temporary), args.gib)
        figures["checkpoint_gib"] = size / GIB
        for ranks in args.ranks:
            bound = 1.3 * size / GIB + 2 * ranks
            print(f"  {size / GIB:.2f} GiB, {ranks} ranks; at most {bound:.1f} GiB together")
            sides = {way: measure(way, Path(temporary), ranks) for way in WAYS}
            for way, found in sides.items():
                print(
                    f"    {WAYS[way]:42} {found['gib']:.2f} GiB together, {found['gib_without_files']:.2f} without "
                    f"mapped files, {found['gib_of_largest']:.2f} the largest rank; {found['seconds']:.1f} s"
                )
                names = ("gib", "gib_without_files", "gib_of_largest", "seconds")
                figures |= {f"{way}_{ranks}_ranks_{name}": found[name] for name in names}
            same = abs(sides["pi_ray"]["held"] / sides["whole"]["held"] - 1)
            assert same < 1e-6, f"the two sides hold other weights: {same}"
            figures[f"share_of_bound_{ranks}_ranks"] = sides["pi_ray"]["gib"] / bound
    last_line(**figures)


if __name__ == "__main__":
    main()
