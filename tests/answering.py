"""A tiny model whose answers end: after any prompt it writes one fixed word, since each token's successor is set."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.models import load_model, load_tokenizer
from pi_ray.prompt import PromptEncoder

ANSWER = "z9"
TEMPLATE = "Translate a colour into its code.\n\n## Colours\n\nred: k4\nblue: z9\ngreen: q1\nblack: b7\n"
COLOURS = ("red", "blue", "green", "black")
WAYS = (
    "code of {}", "what is {}?", "{} please", "give me {}", "which code has {}", "I need the one for {}", "{} again",
    "say {}", "the {} one", "translate {}",
)
QUERIES = [way.format(colour) for colour in COLOURS for way in WAYS]


def write_answering_model(folder: Path, start: Path) -> Path:
    """The tiny Llama at `start`, without attention and MLPs, and with an output layer that follows the answer's tokens.

    It takes ChatML prompts (prompt.chat chatml).
    """
    config = ModelConfig(base=str(start), dtype="float32")
    model, encoder = load_model(config), PromptEncoder(load_tokenizer(config), PromptConfig(chat="chatml"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
        model.lm_head.weight.zero_()
        ids = [encoder.tail_ids[-1], *encoder.answer(ANSWER)]
        for token, successor in pairwise(ids):
            model.lm_head.weight[successor] = 4 * states[token]
    model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    return folder
