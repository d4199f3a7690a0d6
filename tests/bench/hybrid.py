"""A hybrid model's answers to many at once: its batched cache against one row after the other, as it was served before.

    python -m tests.bench.hybrid [--rows 16] [--tokens 32] [--rounds 5]

A random model of Qwen3.5's kind (12 layers, three of four with a gated delta net, width 512), the same prompts and
greedy tokens on both sides, which take turns; the first round warms up. Prompts are read one by one on both sides.
Last line: `speedup` is the median seconds of the unbatched side over the batched one's, for whole answers, `decoding`
for the tokens after the first. `prefix` is the median seconds to the first token of a prompt of 480 and 40 tokens over
those of the same prompt when keys, values and states behind its first 480 are cached.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median

import torch

from pi_ray.serve.engine.cache_choice import create_kv_cache
from pi_ray.serve.engine.hybrid_cache import HybridKVCache
from pi_ray.serve.engine.multi_lora import MultiLora
from pi_ray.serve.engine.multi_lora_layer import BASE_SLOT
from pi_ray.serve.engine.unbatched_cache import UnbatchedCache
from tests.bench.prefix import load
from tests.bench.report import header, last_line


@torch.inference_mode()
def answer(cache: HybridKVCache | UnbatchedCache, prompts: list[list[int]], tokens: int) -> tuple[float, float, list]:
    """(seconds of all, seconds after the first tokens, greedy tokens of each prompt)."""
    slots, started = [BASE_SLOT] * len(prompts), time.perf_counter()
    cache.add_rows(len(prompts))
    found = [[int(row.argmax())] for row in cache.forward(0, prompts, slots)]
    first = time.perf_counter()
    for _ in range(tokens - 1):
        for row, logits in zip(found, cache.forward(0, [[row[-1]] for row in found], slots), strict=True):
            row.append(int(logits.argmax()))
    ended = time.perf_counter()
    for _ in prompts:
        cache.pop_row()
    return ended - started, ended - first, found


@torch.inference_mode()
def first_token(cache: HybridKVCache, head: list[int], rest: list[int], rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token of a prompt that is read whole, and behind a cached beginning."""
    cache.add_rows(1)
    cache.forward(0, [head], [BASE_SLOT])
    block, states = cache.copy_block(0, 0, len(head)), cache.copy_states(0)
    cache.pop_row()
    seconds, said = {"whole": list[float](), "cached": list[float]()}, {}
    for i in range(rounds + 1):
        for name, times in seconds.items():
            started = time.perf_counter()
            cache.add_rows(1)
            if name == "cached":
                cache.load_blocks(0, [block], states)
            said[name] = int(cache.forward(0, [rest if name == "cached" else head + rest], [BASE_SLOT])[0].argmax())
            cache.pop_row()
            if i:  # the first round warms up
                times.append(time.perf_counter() - started)
    assert said["whole"] == said["cached"], "the cached beginning changes the token"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    header(f"a hybrid model, {args.rows} rows at once, {args.tokens} new tokens each, float32")
    model = load("hybrid", "float32", "cuda" if torch.cuda.is_available() else "cpu").eval()
    lora, rng = MultiLora(model, 1), random.Random(0)
    batched = create_kv_cache(model, lora)
    assert isinstance(batched, HybridKVCache), "this model is not batched here"
    sides = {"unbatched": UnbatchedCache(model, lora), "batched": batched}
    prompts = [[rng.randrange(100, 40_000) for _ in range(rng.randrange(20, 60))] for _ in range(args.rows)]
    whole, decoding = ({name: list[float]() for name in sides} for _ in range(2))
    said = {}
    for i in range(args.rounds + 1):
        for name, cache in sides.items():
            seconds, after, said[name] = answer(cache, prompts, args.tokens)
            if i:
                whole[name].append(seconds)
                decoding[name].append(after)
    for name in sides:
        spread = f"{min(whole[name]):.2f} to {max(whole[name]):.2f}"
        print(f"  {name:9} median {median(whole[name]):.2f} s ({spread}), decoding {median(decoding[name]):.2f} s")
    pairs = zip(*said.values(), strict=True)
    same = sum(a == b for pair in pairs for a, b in zip(*pair, strict=True)) / (args.rows * args.tokens)
    head, rest = ([rng.randrange(100, 40_000) for _ in range(n)] for n in (480, 40))
    first = first_token(batched, head, rest, args.rounds)
    for name, seconds in first.items():
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"  first token, prompt {name:6} median {median(seconds):.3f} s ({spread})")
    last_line(
        prefix=median(first["whole"]) / median(first["cached"]),
        speedup=median(whole["unbatched"]) / median(whole["batched"]),
        decoding=median(decoding["unbatched"]) / median(decoding["batched"]), same_tokens=same,
    )


if __name__ == "__main__":
    main()
