"""Template compression at a measured rate: x~_tmp = C(x_tmp, rate), paper equation 2, from the cache where it was made
before.

Instruction and documents are compressed separately (paper 4.1): at one common rate by one compressor, or each by its
own at its own rate where `compress.documents` says so. Rates are counted with the tokenizer of the model that will read
the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

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

    instruction, documents = config.of_instruction, config.of_documents
    first = compressors[instruction.name](instruction)
    return first, first if documents == instruction else compressors[documents.name](documents)


def compress_template(
    compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig,
    documents: Compressor | None = None,
) -> CompressedTemplate:  # fmt: skip
    """The template at `rate` (0: nothing, 1: unchanged). `documents` compresses its documents, with
    `compress.documents`.
    """
    if _is_split(rate, config):
        if documents is None:
            raise ValueError("compress.documents is set: `load_compressors` gives the documents' compressor too")
        parts = zip((compressor, documents), _split(template, rate, config), strict=True)
        results = [compress_template(c, part, r, tokenizer, own) for c, (part, r, own) in parts]
        return _combine(template, tokenizer, results)
    found = cached_template(template, rate, tokenizer, config)
    if found is None:
        found = RateSearch(compressor, template, rate, tokenizer, config).run()
        cache.store_result(_cache_key(template, rate, tokenizer, config), asdict(found))
    return found


def cached_template(
    template: Template, rate: float, tokenizer: Any, config: CompressConfig
) -> CompressedTemplate | None:
    """A result that needs no compressor: rate 0 or 1, or one made before. None otherwise, also for a damaged file."""
    if _is_split(rate, config):
        parts = [cached_template(part, r, tokenizer, own) for part, r, own in _split(template, rate, config)]
        results = [part for part in parts if part is not None]
        return _combine(template, tokenizer, results) if len(results) == len(parts) else None
    if rate in (0, 1) or not template.text:
        full = count_tokens(tokenizer, template.text)
        return CompressedTemplate(template.text if rate else "", rate, rate, full if rate else 0, full)
    stored = cache.load_result(_cache_key(template, rate, tokenizer, config))
    try:
        return CompressedTemplate(**stored) if stored is not None else None
    except TypeError:
        return None


def _is_split(rate: float, config: CompressConfig) -> bool:
    """Whether instruction and documents are compressed each in its own way."""
    return config.documents is not None and rate not in (0, 1)


def _split(template: Template, rate: float, config: CompressConfig) -> list[tuple[Template, float, CompressConfig]]:
    """The instruction and the documents, each as a template with its rate and its compressor's settings."""
    assert config.documents is not None
    return [
        (Template(template.instruction), rate, config.of_instruction),
        (Template("", template.documents), config.documents.at(rate), config.of_documents),
    ]


def _combine(template: Template, tokenizer: Any, parts: Sequence[CompressedTemplate]) -> CompressedTemplate:
    """Instruction and documents as one result, whose asked rate is the mean of theirs weighted by tokens."""
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
