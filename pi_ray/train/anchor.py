"""The anchor against forgetting: everyday questions, to which the student keeps the base model's distribution.

What a model answers to questions that have nothing to do with the task drifts while it learns the task. Some rows of
each batch (`train.distill.anchor`) hold it: bundled questions with answers, whose tokens the base model judges once.
They share no text with those by which the evaluation measures forgetting.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.train.batches import TokenRow

ANCHOR = Path(__file__).with_name("anchor.jsonl")


class AnchorRows:
    """The bundled questions in the run's chat frame, without a template and the run's wording of queries."""

    def __init__(self, config: RunConfig):
        frame = config.prompt.model_copy(update={"query": "{query}"})
        encoder = PromptEncoder(load_tokenizer(config.model), frame)
        pairs = [json.loads(line) for line in ANCHOR.read_text(encoding="utf-8").splitlines()]
        self.prefix = encoder.prefix("")
        self._rows = [(encoder.row(pair["query"]), encoder.answer(pair["answer"])) for pair in pairs]
        self.prompt_lengths, self.label_lengths = np.array([[len(p), len(a)] for p, a in self._rows]).T

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, numbers: Sequence[int]) -> list[TokenRow]:
        return [self._rows[n] for n in numbers]
