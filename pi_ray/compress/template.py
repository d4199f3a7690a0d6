"""Template compression at a measured rate, x~_tmp = C(x_tmp, rate) (paper equation 2), cached by content.

Instruction and documents are compressed separately (paper 4.1): at one common rate by one compressor, or each by its
own at its own rate where `compress.documents` says so. Tools are documents that stay JSON (tools.py). The tokenizer of
the model that reads the text counts the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pi_ray.compress import cache
from pi_ray.compress.none import NoCompression
from pi_ray.compress.rate_control import CompressedTemplate, RateSearch, count_tokens
from pi_ray.compress.tools import ToolsSearch
from pi_ray.config import CompressConfig, ModelConfig
from pi_ray.models import base_digest
from pi_ray.models.base_files import gguf_file
from pi_ray.prompt import Template
from pi_ray.protocols import Compressor
from pi_ray.run.artifact import digest

ALGORITHM = 2  # part of the cache key: raise it when equal input gives another output


@lru_cache(maxsize=2)
def load_compressor(config: CompressConfig) -> Compressor:
    """The compressor that `config` names. Its model is loaded once for instruction and documents that share it."""
    from pi_ray.registry import compressors

    return compressors[config.name](config)


def compress_template(
    template: Template, rate: float, tokenizer: Any, config: CompressConfig,
    load: Callable[[CompressConfig], Compressor] = load_compressor, is_stored: bool = True,
) -> CompressedTemplate:
    """The template at `rate` (0: nothing, 1: unchanged). What is in the cache needs no compressor; what is not goes
    there if `is_stored`.
    """
    parts = split_template(template, rate, config)
    if len(parts) > 1:
        made = [compress_template(part.template, part.rate, tokenizer, part.config, load, is_stored) for part in parts]
        return combine_parts(template, tokenizer, parts, made)
    found = cached_template(template, rate, tokenizer, config)
    if found is None:
        found = _search(load(config), template, rate, tokenizer, config)
        if is_stored:
            cache.store_result(_cache_key(template, rate, tokenizer, config), asdict(found))
    return found


def cached_template(
    template: Template, rate: float, tokenizer: Any, config: CompressConfig,
) -> CompressedTemplate | None:
    """One part's result that needs no model: rate 0 or 1, no compression, or one in the cache, undamaged. Else None."""
    if rate in (0, 1) or not template.text:
        full = count_tokens(tokenizer, template.text)
        return CompressedTemplate(template.text if rate else "", rate, rate, full if rate else 0, full)
    if config.name == "none":
        return _search(NoCompression(config), template, rate, tokenizer, config)
    stored = cache.load_result(_cache_key(template, rate, tokenizer, config))
    try:
        return CompressedTemplate(**stored) if stored is not None else None
    except TypeError:
        return None


def _search(
    compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig,
) -> CompressedTemplate:
    """Compress one part, which has either text or tools."""
    search = ToolsSearch if template.tools else RateSearch
    return search(compressor, template, rate, tokenizer, config).run()


class TemplatePart(NamedTuple):
    """A text to compress, or tools, with the rate, the compressor's settings and a name for people."""

    template: Template
    rate: float
    config: CompressConfig
    name: str = "template"


def split_template(template: Template, rate: float, config: CompressConfig) -> list[TemplatePart]:
    """Split a template into the parts that are compressed by themselves, each a template of its own.

    These are the text, or with `compress.documents` the instruction and the documents; and the tools, as documents.
    """
    if rate in (0, 1) or not (template.instruction or template.documents):
        return [TemplatePart(template, rate, config)]
    parts = [TemplatePart(Template(template.instruction, template.documents), rate, config)]
    own, documents_rate = config.for_documents, config.documents.rate_at(rate) if config.documents else rate
    if config.documents:
        parts = [
            TemplatePart(Template(template.instruction), rate, config.for_instruction, "instruction"),
            TemplatePart(Template("", template.documents), documents_rate, own, "documents"),
        ]
    if template.tools:
        tools = Template("", (), template.tools, template.tool_uses)
        parts.append(TemplatePart(tools, documents_rate, own, "tools"))
    return parts


def combine_parts(
    template: Template, tokenizer: Any, parts: Sequence[TemplatePart], made: Sequence[CompressedTemplate],
) -> CompressedTemplate:
    """The results of `split_template`'s parts as one, whose asked rate is the mean of theirs weighted by tokens."""
    if len(made) == 1:
        return made[0]
    text = "\n\n".join(result.text for result in made if result.text)
    tokens, full = count_tokens(tokenizer, text), count_tokens(tokenizer, template.text)
    asked = sum(result.asked * result.full_tokens for result in made) / max(sum(r.full_tokens for r in made), 1)
    note = "; ".join(f"{part.name}: {result.note}" for part, result in zip(parts, made, strict=True) if result.note)
    return CompressedTemplate(text, round(asked, 4), round(tokens / max(full, 1), 4), tokens, full, note)


def _cache_key(template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> str:
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k != "api_key_env"}
    tools = [template.tools, template.tool_uses] if template.tools else []
    texts = [template.instruction, template.documents, *tools]
    return digest([ALGORITHM, *texts, rate, settings, _model_content(config.model), _tokenizer_hash(tokenizer)])


def _model_content(model: str) -> str:
    """A hash of a model whose files are on this machine, where they may be replaced by others; "" for another one."""
    is_here = bool(model) and (Path(model).expanduser().is_dir() or gguf_file(model))
    return base_digest(ModelConfig(base=model)) if is_here else ""


@lru_cache(maxsize=8)
def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend is not None else str(tokenizer.name_or_path))
