"""LLMLingua-2 (Pan et al. 2024, arXiv 2403.12968): a small encoder classifies each token as worth keeping or not.

A word scores by the mean probability of "preserve" over its tokens; the best words stay, in order (their section 4.2).
The `llmlingua` package's code knows two models by name and downloads a tokenizer; this runs any token classifier.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

from pi_ray import models
from pi_ray.compress import words
from pi_ray.compress.ranking import Ranking, RankingCompressor
from pi_ray.config import COMPRESS_MODELS, CompressConfig
from pi_ray.errors import ModelError
from pi_ray.models import base_files

PRESERVE = 1  # the label
LENGTH = 512  # tokens of a chunk with its special tokens, as the model was trained
ROOM = LENGTH - 10  # two of them are special, and a cut may add some
BATCH = 8  # chunks


class LLMLingua2(RankingCompressor):
    """Compressor "llmlingua2". `config.model` is a token classifier; it runs on the CPU in float32."""

    def __init__(self, config: CompressConfig):
        super().__init__()
        with models.name_load_errors(f"compress.model '{config.model}'"):
            name = base_files.resolve_base(config.model)
            architectures = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or []
            if not any("ForTokenClassification" in a for a in architectures):
                found = f"compress.model '{config.model}' is no token classifier, which llmlingua2 needs"
                raise ModelError(f"{found}; {COMPRESS_MODELS['llmlingua2']} is one")
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForTokenClassification.from_pretrained(name, trust_remote_code=False, dtype=torch.float32)
        self.model = model.eval()

    def rank(self, text: str) -> Ranking:
        chunks = self._chunks(text)
        results = [r for at in range(0, len(chunks), BATCH) for r in self._classify(text, chunks[at : at + BATCH])]
        offsets = [span for spans, _ in results for span in spans]
        chances = torch.cat([torch.zeros(0), *(chance for _, chance in results)])
        return Ranking.from_tokens(words.word_spans(text), offsets, chances)

    def _chunks(self, text: str) -> list[words.Span]:
        """Spans of runs of words that fit the model."""
        pieces = words.word_spans(text)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        lengths = [len(t) for t in words.tokens_by_span(pieces, offsets)]
        return [(pieces[c[0]][0], pieces[c[-1]][1]) for c in words.split_chunks(text, pieces, lengths, ROOM)]

    @torch.no_grad()
    def _classify(self, text: str, chunks: list[words.Span]) -> Iterator[tuple[list[words.Span], torch.Tensor]]:
        """For each chunk the spans of its tokens in `text`, and their probabilities of "preserve", shape (tokens,)."""
        batch: Any = self.tokenizer(
            [text[start:end] for start, end in chunks], padding=True, truncation=True, max_length=LENGTH,
            return_offsets_mapping=True, return_special_tokens_mask=True, return_tensors="pt",
        )
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chances, masks = torch.softmax(logits, -1)[..., PRESERVE], batch["special_tokens_mask"] == 0
        for (start, _), chance, offsets, mask in zip(chunks, chances, batch["offset_mapping"], masks, strict=True):
            yield [(start + a, start + b) for a, b in offsets[mask].tolist()], chance[mask]
