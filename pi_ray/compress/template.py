"""Template compression with a promise: x~_tmp = C(x_tmp, rate), paper equation 2, at a rate that was measured, not hoped for.

Instruction and documents are compressed separately (paper 4.1): at one common rate by one compressor, or each by its own at its own rate
where `compress.documents` says so. The achieved rate is counted with the tokenizer of the model that will read the text; when it is off,
the compressor is asked again for more or less. Results are kept by content hash, because a template is the same for every row and run.
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
    """The instruction's compressor and the documents', which is the same one unless they differ. Models are loaded here."""
    from pi_ray.registry import compressors

    instruction = compressors[config.name](config.of_instruction)
    return instruction, instruction if config.of_documents == config.of_instruction else compressors[config.of_documents.name](config.of_documents)


def compress_template(
    compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig, documents: Compressor | None = None,
) -> CompressedTemplate:
    """The template at `rate` (0 nothing, 1 untouched), from the cache when it was made before. `documents` compresses the documents."""
    if _apart(rate, config):
        if documents is None:
            raise ValueError("compress.documents is set: `load` gives the documents' compressor too")
        parts = zip((compressor, documents), _parts(template, rate, config), strict=True)
        return _together(template, tokenizer, [compress_template(c, *part[:2], tokenizer, part[2]) for c, part in parts])
    found = cached_template(template, rate, tokenizer, config)
    if found is None:
        found = RateSearch(compressor, template, rate, tokenizer, config).run()
        cache.store_result(_key(template, rate, tokenizer, config), asdict(found))
    return found


def cached_template(template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> CompressedTemplate | None:
    """What needs no compressor: rate 0 or 1, or a result made before. None otherwise, and when the cached file is damaged."""
    if _apart(rate, config):
        parts = [cached_template(t, r, tokenizer, k) for t, r, k in _parts(template, rate, config)]
        return None if None in parts else _together(template, tokenizer, parts)
    if rate in (0, 1) or not template.text:
        full = count_tokens(tokenizer, template.text)
        return CompressedTemplate(template.text if rate else "", rate, rate, full if rate else 0, full)
    stored = cache.load_result(_key(template, rate, tokenizer, config))
    try:
        return CompressedTemplate(**stored) if stored is not None else None
    except TypeError:
        return None


def _apart(rate: float, config: CompressConfig) -> bool:
    """Whether instruction and documents are compressed each in its own way."""
    return config.documents is not None and rate not in (0, 1)


def _parts(template: Template, rate: float, config: CompressConfig) -> list[tuple[Template, float, CompressConfig]]:
    """Instruction and documents, each as a template of its own, with its rate and compressor."""
    return [
        (Template(template.instruction), rate, config.of_instruction),
        (Template("", template.documents), config.documents.at(rate), config.of_documents),
    ]


def _together(template: Template, tokenizer: Any, parts: Sequence[CompressedTemplate]) -> CompressedTemplate:
    """Instruction and documents as one result, whose asked rate is the mean of theirs by tokens."""
    text, full = "\n\n".join(p.text for p in parts if p.text), count_tokens(tokenizer, template.text)
    asked = sum(p.asked * p.full_tokens for p in parts) / max(sum(p.full_tokens for p in parts), 1)
    notes = [f"{name}: {part.note}" for name, part in zip(("instruction", "documents"), parts, strict=True) if part.note]
    tokens = count_tokens(tokenizer, text)
    return CompressedTemplate(text, round(asked, 4), round(tokens / max(full, 1), 4), tokens, full, "; ".join(notes))


def _key(template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> str:
    made_by = {k: v for k, v in config.model_dump(mode="json").items() if k != "api_key_env"}
    return digest([ALGORITHM, template.instruction, template.documents, rate, made_by, _tokenizer_hash(tokenizer)])


@lru_cache(maxsize=8)
def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend is not None else str(tokenizer.name_or_path))
