"""What transformers answers, to hold other ways of answering against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def generate_alone(model: Any, prefix: list[int], rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers' own `generate` for each row behind the prefix, one row at a time."""
    found = []
    for row in rows:
        ids = torch.tensor([prefix + row])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=-1
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


@torch.no_grad()
def label_logprobs_alone(
    model: Any, prefix: list[int], prompt: list[int], label: list[int]
) -> tuple[torch.Tensor, list[bool]]:
    """Of each token of a label, in an ordinary forward pass: its log-probability, and whether it is the likeliest."""
    logits = model(input_ids=torch.tensor([prefix + prompt + label])).logits[0, -len(label) - 1 : -1]
    asked = torch.tensor(label)
    return logits.log_softmax(-1).gather(1, asked[:, None])[:, 0], (logits.argmax(-1) == asked).tolist()
