"""Greedy answers to many queries behind one long prompt: the teacher's and evaluation's work, against transformers.

    python -m tests.bench.generation [--rows 64] [--tokens 24] [--rounds 3] [--model smollm2-135m]
    python -m tests.bench.generation --conversations 4 [--turns 8]   (rows: all turns of so many conversations)

The same model, rank-32 adapter, token ids and number of new tokens on all sides, which take turns; medians of all
rounds. Sides:

    pi-ray          one copy of the prompt's keys and values for all rows, and a conversation is read once
    transformers    `generate` with left-padded whole prompts
    with its cache  `generate` with a prefilled cache of the prompt, repeated for every row, as its documentation does

Each side answers 16 and 64 rows at once, of like length together, and the faster counts. Last line: `over_*` is the
peer's seconds over pi-ray's; `same_tokens` is the share of new tokens in which pi-ray agrees with the peer, up to each
row's first difference.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.models import load_model
from pi_ray.train import lora
from pi_ray.train.generation import compute_prefix_cache, generate_greedy
from pi_ray.train.row_chains import chain_batches
from tests.bench.report import header, last_line

PREFIX, SHORTEST, LONGEST = 550, 20, 40
BATCHES = (16, 64)
SHORTEST_TURN, LONGEST_TURN = 60, 240  # tokens that a turn adds to its conversation

Answers = list[list[int]]


def ours(model: Any, prefix: list[int], rows: Answers, tokens: int, batch: int) -> Answers:
    cache, answers = compute_prefix_cache(model, prefix), dict[int, list[int]]()
    for part in chain_batches(rows, batch):
        written = generate_greedy(model, prefix, [rows[i] for i in part], tokens, None, cache)
        answers |= zip(part, written, strict=True)
    return [answers[i] for i in range(len(rows))]


def transformers_alone(model: Any, prefix: list[int], rows: Answers, tokens: int, batch: int) -> Answers:
    return _peer(model, [prefix + row for row in rows], tokens, batch, lambda size: {})


def transformers_with_cache(model: Any, prefix: list[int], rows: Answers, tokens: int, batch: int) -> Answers:
    """Padding lies behind the prompt here, which the attention mask leaves out."""
    filled = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([prefix]), past_key_values=filled, use_cache=True)

    def repeated(size: int) -> dict[str, Any]:
        cache = copy.deepcopy(filled)
        cache.batch_repeat_interleave(size)
        return {"past_key_values": cache}

    return _peer(model, rows, tokens, batch, repeated, prefix)


def _peer(
    model: Any, prompts: Answers, tokens: int, batch: int, more: Callable[[int], dict[str, Any]],
    prefix: list[int] | None = None,
) -> Answers:
    found: Answers = []
    head = prefix or []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(map(len, part))
        ids = torch.tensor([head + [0] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[1] * len(head) + [0] * (longest - len(p)) + [1] * len(p) for p in part])
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0, **more(len(part)),
            )
        found += made[:, ids.shape[1] :].tolist()
    return found


def conversations(rng: random.Random, count: int, turns: int, size: int) -> Answers:
    """The prompts of all turns, each of which begins as the turn before it."""
    found: Answers = []
    for _ in range(count):
        past: list[int] = []
        for _ in range(turns):
            past = past + [rng.randrange(100, size) for _ in range(rng.randint(SHORTEST_TURN, LONGEST_TURN))]
            found.append(past)
    return found


def agreement(mine: Answers, theirs: Answers) -> float:
    """Share of tokens up to each row's first difference."""
    same = sum(next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
               for x, y in zip(mine, theirs, strict=True))
    return same / sum(map(len, mine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--conversations", type=int, default=0)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    header("greedy answers behind one prompt")
    model = lora.add_lora(load_model(ModelConfig(base=args.model)), LoraConfig(), seed=0).eval()
    model.generation_config.eos_token_id = None
    rng, size = random.Random(0), model.config.vocab_size
    prefix = [rng.randrange(100, size) for _ in range(PREFIX)]
    rows = [[rng.randrange(100, size) for _ in range(rng.randint(SHORTEST, LONGEST))] for _ in range(args.rows)]
    if args.conversations:
        rows = conversations(rng, args.conversations, args.turns, size)
    rows.sort(key=len, reverse=True)
    sides = {"pi-ray": ours, "transformers": transformers_alone, "with its cache": transformers_with_cache}
    tokens = f"{PREFIX} + {len(rows[-1])} to {len(rows[0])} tokens, {args.tokens} new ones"
    print(f"  {len(rows)} rows of {tokens}, {model.dtype}")
    seconds: dict[tuple[str, int], list[float]] = {(name, b): [] for name in sides for b in BATCHES}
    answers: dict[str, Answers] = {}
    for _ in range(args.rounds):
        for (name, batch), taken in seconds.items():
            started = time.perf_counter()
            answers[name] = sides[name](model, prefix, rows, args.tokens, batch)
            taken.append(time.perf_counter() - started)
    best: dict[str, float] = {}
    for (name, batch), taken in seconds.items():
        best[name] = min(best.get(name, float("inf")), median(taken))
        spread = f"{min(taken):.1f} to {max(taken):.1f}"
        print(f"  {name:15} {batch:3} rows at once  {median(taken):7.2f} s ({spread})")
    peers = [name for name in sides if name != "pi-ray"]
    last_line(
        **{f"over_{name.replace(' ', '_')}": best[name] / best["pi-ray"] for name in peers},
        same_tokens=agreement(answers["pi-ray"], answers["transformers"]),
    )


if __name__ == "__main__":
    main()
