"""LLMLingua-2 (Pan et al. 2024, arXiv 2403.12968): a small encoder says of each token whether it is worth keeping.

A word scores by the mean probability of "preserve" over its tokens, and the best words stay, in order (their section 4.2). The
`llmlingua` package's own code knows two models by name and downloads a tokenizer to count with; this runs any token classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import logging

from pi_ray import models
from pi_ray.compress import words
from pi_ray.compress.ranking import Ranking, RankingCompressor
from pi_ray.config import COMPRESS_MODELS, CompressConfig
from pi_ray.errors import ModelError

PRESERVE = 1  # the label
LENGTH = 512  # tokens of a chunk with its special tokens, as the model was trained
ROOM = LENGTH - 10  # of which two are special, and a cut may add some
BATCH = 8  # chunks


class LLMLingua2(RankingCompressor):
    """Compressor "llmlingua2". `config.model` is a token classifier; it runs on the CPU in float32."""

    def __init__(self, config: CompressConfig):
        super().__init__()
        logging.disable_progress_bar()
        name = models.resolve(config.model)
        try:
            architectures = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or []
            if not any("ForTokenClassification" in a for a in architectures):
                raise ModelError(f"compress.model '{config.model}' is no token classifier, which llmlingua2 needs; {COMPRESS_MODELS['llmlingua2']} is one")
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.model = AutoModelForTokenClassification.from_pretrained(name, trust_remote_code=False, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"compress.model '{config.model}' cannot be loaded: {str(error).strip().splitlines()[0]}") from error

    def rank(self, text: str) -> Ranking:
        pieces, scores, sizes = words.word_spans(text), [], []
        chunks = list(self._chunks(text, pieces))
        for at in range(0, len(chunks), BATCH):
            for part, (offsets, chance) in zip(chunks[at : at + BATCH], self._preserve(text, chunks[at : at + BATCH]), strict=True):
                tokens = words.tokens_by_span(part, offsets)
                scores += [float(chance[t].mean()) if t else 0.0 for t in tokens]
                sizes += [len(t) for t in tokens]
        return Ranking(pieces, scores, sizes)

    def _chunks(self, text: str, pieces: list[words.Span]) -> Iterator[list[words.Span]]:
        """The words in runs that fit the model, each ending with a sentence or a line where one ends in its second half."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        lengths = [len(t) for t in words.tokens_by_span(pieces, offsets)]
        first = 0
        while first < len(pieces):
            last, used = first, 0
            while last < len(pieces) and (last == first or used + lengths[last] <= ROOM):
                used += lengths[last]
                last += 1
            if last < len(pieces):
                second_half = range((first + last) // 2 + 1, last + 1)
                last = max((i for i in second_half if text[pieces[i - 1][1] - 1] == "." or "\n" in text[pieces[i - 1][1] : pieces[i][0]]), default=last)
            yield pieces[first:last]
            first = last

    @torch.no_grad()
    def _preserve(self, text: str, chunks: list[list[words.Span]]) -> Iterator[tuple[list[words.Span], torch.Tensor]]:
        """Of each chunk, the characters of its tokens in `text`, and their probability of being worth keeping."""
        batch: Any = self.tokenizer(
            [text[c[0][0] : c[-1][1]] for c in chunks], padding=True, truncation=True, max_length=LENGTH,
            return_offsets_mapping=True, return_special_tokens_mask=True, return_tensors="pt",
        )
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chances = torch.softmax(logits, -1)[..., PRESERVE]
        for chunk, chance, offsets, special in zip(chunks, chances, batch["offset_mapping"], batch["special_tokens_mask"], strict=True):
            start = chunk[0][0]
            yield [(start + a, start + b) for a, b in offsets[special == 0].tolist()], chance[special == 0]
