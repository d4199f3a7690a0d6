"""Template compression at a measured rate, x~_tmp = C(x_tmp, rate) (paper equation 2), cached by content.

Instruction and documents are compressed separately (paper 4.1): at one common rate by one compressor, or each by its
own at its own rate where `compress.documents` says so. The tokenizer of the model that reads the text counts the rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

from pi_ray.compress import cache
from pi_ray.compress.rate_control import CompressedTemplate, RateSearch, count_tokens
from pi_ray.config import CompressConfig
from pi_ray.prompt import Template
from pi_ray.protocols import Compressor
from pi_ray.run.artifact import digest

ALGORITHM = 2  # part of the cache key: raise it when equal input gives another output


def load_compressors(config: CompressConfig) -> tuple[Compressor, Compressor]:
    """The instruction's and the documents' compressor with their models loaded; the same one unless they differ."""
    from pi_ray.registry import compressors

    instruction, documents = config.for_instruction, config.for_documents
    first = compressors[instruction.name](instruction)
    return first, first if documents == instruction else compressors[documents.name](documents)


def compress_template(
    compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig,
    documents: Compressor | None = None,
) -> CompressedTemplate:  # fmt: skip
    """The template at `rate` (0: nothing, 1: unchanged); `documents` is needed where `compress.documents` is set."""
    parts = split_template(template, rate, config)
    if len(parts) > 1:
        if documents is None:
            raise ValueError("compress.documents is set: `load_compressors` gives the documents' compressor too")
        both = zip((compressor, documents), parts, strict=True)
        return combine_parts(template, tokenizer, [compress_template(c, t, r, tokenizer, k) for c, (t, r, k) in both])
    found = cached_template(template, rate, tokenizer, config)
    if found is None:
        found = RateSearch(compressor, template, rate, tokenizer, config).run()
        cache.store_result(_cache_key(template, rate, tokenizer, config), asdict(found))
    return found


def cached_template(
    template: Template, rate: float, tokenizer: Any, config: CompressConfig
) -> CompressedTemplate | None:
    """A result that needs no compressor: rate 0 or 1, or one made before. None otherwise, also for a damaged file."""
    parts = split_template(template, rate, config)
    if len(parts) > 1:
        found = [cached_template(part, r, tokenizer, own) for part, r, own in parts]
        results = [part for part in found if part is not None]
        return combine_parts(template, tokenizer, results) if len(results) == len(parts) else None
    if rate in (0, 1) or not template.text:
        full = count_tokens(tokenizer, template.text)
        return CompressedTemplate(template.text if rate else "", rate, rate, full if rate else 0, full)
    stored = cache.load_result(_cache_key(template, rate, tokenizer, config))
    try:
        return CompressedTemplate(**stored) if stored is not None else None
    except TypeError:
        return None


class TemplatePart(NamedTuple):
    """A text to compress, its rate and its compressor's settings."""

    template: Template
    rate: float
    config: CompressConfig


def split_template(template: Template, rate: float, config: CompressConfig) -> list[TemplatePart]:
    """The template in one part, or with `compress.documents` the instruction and the documents, each as a template."""
    if config.documents is None or rate in (0, 1):
        return [TemplatePart(template, rate, config)]
    return [
        TemplatePart(Template(template.instruction), rate, config.for_instruction),
        TemplatePart(Template("", template.documents), config.documents.rate_at(rate), config.for_documents),
    ]


def combine_parts(template: Template, tokenizer: Any, parts: Sequence[CompressedTemplate]) -> CompressedTemplate:
    """The results of `split_template`'s parts as one, whose asked rate is the mean of theirs weighted by tokens."""
    if len(parts) == 1:
        return parts[0]
    text, full = "\n\n".join(p.text for p in parts if p.text), count_tokens(tokenizer, template.text)
    asked = sum(p.asked * p.full_tokens for p in parts) / max(sum(p.full_tokens for p in parts), 1)
    named = zip(("instruction", "documents"), parts, strict=True)
    note = "; ".join(f"{name}: {part.note}" for name, part in named if part.note)
    tokens = count_tokens(tokenizer, text)
    return CompressedTemplate(text, round(asked, 4), round(tokens / max(full, 1), 4), tokens, full, note)


def _cache_key(template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> str:
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k != "api_key_env"}
    return digest([ALGORITHM, template.instruction, template.documents, rate, settings, _tokenizer_hash(tokenizer)])


@lru_cache(maxsize=8)
def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend is not None else str(tokenizer.name_or_path))
