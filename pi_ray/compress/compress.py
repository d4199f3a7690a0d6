"""Template compression with a promise: x~_tmp = C(x_tmp, rate), paper equation 2, at a rate that was measured, not hoped for.

Instruction and documents are compressed separately (paper 4.1) at one common rate. The achieved rate is counted with the tokenizer
of the model that will read the text; when it is off, the compressor is asked again for more or less. Results are kept by content
hash, because a template is the same for every row and every run.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pi_ray import models
from pi_ray.artifact import digest, write_atomic
from pi_ray.compress import words
from pi_ray.compress.protect import Hold, Unit, units
from pi_ray.config import CompressConfig
from pi_ray.prompt import Template
from pi_ray.protocols import Compressor

ALGORITHM = 1  # part of the cache key: raise it when equal input gives another output
TRIES = 8
AIM = 0.5  # stop at this share of the tolerance: a few more tries are cheap, and made once
NUMBER_SHARE = 0.75  # numbers are held while protected text takes at most this share of what may stay


@dataclass(frozen=True)
class Compressed:
    """A template at one rate. `asked` and `achieved` are shares of `full_tokens`; `note` says in words what could not be kept."""

    text: str
    asked: float
    achieved: float
    tokens: int
    full_tokens: int
    note: str = ""


def compress_template(compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> Compressed:
    """The template at `rate` (0 nothing, 1 untouched), from the cache when it was made before."""
    found = cached(template, rate, tokenizer, config)
    if found is None:
        found = _search(compressor, template, rate, tokenizer, config)
        body = asdict(found)
        write_atomic(_path(template, rate, tokenizer, config), json.dumps({"sha256": digest(body), "result": body}, ensure_ascii=False, indent=1))
    return found


def cached(template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> Compressed | None:
    """What needs no compressor: rate 0 or 1, or a result made before. None otherwise, and when the cached file is damaged."""
    if rate in (0, 1):
        full = _count(tokenizer, template.text)
        return Compressed(template.text if rate else "", rate, rate, full if rate else 0, full)
    try:
        stored = json.loads(_path(template, rate, tokenizer, config).read_bytes())
        return Compressed(**stored["result"]) if stored["sha256"] == digest(stored["result"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> Path:
    key = digest([ALGORITHM, template.instruction, template.documents, rate, config.model_dump(mode="json"), _tokenizer_hash(tokenizer)])
    return models.cache_dir() / "compress" / f"{key}.json"


@lru_cache(maxsize=8)
def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend is not None else str(tokenizer.name_or_path))


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids) if text else 0


class _Part:
    """Instruction or one document, cut into units."""

    def __init__(self, text: str, config: CompressConfig):
        self.text = text
        self.words = words.spans(text)
        self.units = units(text, config)
        self.line_end = [bisect_left(self.units, _next_line(text, u.end), key=lambda v: v.start) for u in self.units]

    def render(self, output: str, hold: Hold) -> str:
        """The units that `output` keeps (at least half of their words) or that are held at least as strongly as `hold`."""
        kept = words.find_kept([self.text[a:b] for a, b in self.words], output.split())
        share = _shares(self.words, kept, self.units)
        chosen = [u.hold >= hold or s >= 0.5 for u, s in zip(self.units, share, strict=True)]
        for i in reversed(range(len(chosen) - 1)):
            if self.units[i].label and not chosen[i]:
                chosen[i] = any(chosen[i + 1 : self.line_end[i]])
        return words.join(self.text, [(u.start, u.end) for u in self.units], chosen)


def _next_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _shares(spans: Sequence[words.Span], kept: Sequence[bool], parts: Sequence[Unit]) -> list[float]:
    """Of each unit, the share of its words that are kept."""
    share, at = [], 0
    for unit in parts:
        first = at
        while at < len(spans) and spans[at][0] < unit.end:
            at += 1
        share.append(sum(kept[first:at]) / max(at - first, 1))
    return share


def _search(compressor: Compressor, template: Template, rate: float, tokenizer: Any, config: CompressConfig) -> Compressed:
    """Ask for rates until the measured one is well within `config.tolerance`, narrowing by interpolation; keep the closest."""
    parts = [_Part(text, config) for text in (template.instruction, *template.documents) if text]
    full = _count(tokenizer, template.text)

    def draft(outputs: Sequence[str], hold: Hold) -> Compressed:
        text = "\n\n".join(t for t in (p.render(o, hold) for p, o in zip(parts, outputs, strict=True)) if t)
        tokens = _count(tokenizer, text)
        return Compressed(text, rate, round(tokens / full, 4), tokens, full)

    nothing = [""] * len(parts)
    numbers, floor = draft(nothing, Hold.NUMBER), draft(nothing, Hold.ALWAYS)
    hold, best = (Hold.NUMBER, numbers) if numbers.achieved <= NUMBER_SHARE * rate else (Hold.ALWAYS, floor)
    low, high = (0.0, best.achieved), (1.0, 1.0)  # (asked, achieved) on either side of the goal
    tried: set[str] = set()
    while low[1] < rate and len(tried) < TRIES:
        slope = (rate - low[1]) / max(high[1] - low[1], 1e-6)
        asked = low[0] + (high[0] - low[0]) * min(max(slope, 0.1), 0.9)
        now = draft([compressor.compress(p.text, asked) for p in parts], hold)
        best = min(best if tried else now, now, key=lambda c: abs(c.achieved - rate))
        if abs(now.achieved - rate) <= AIM * config.tolerance or now.text in tried:
            break
        tried.add(now.text)
        low, high = (low, (asked, now.achieved)) if now.achieved > rate else ((asked, now.achieved), high)
    return replace(best, note=_note(best, floor, numbers, template, config))


def _note(best: Compressed, floor: Compressed, numbers: Compressed, template: Template, config: CompressConfig) -> str:
    """What a reader of the report must know about this template; empty when all went as asked."""
    notes = []
    if floor.achieved > best.asked + config.tolerance:
        notes.append(f"protected text alone is {floor.achieved:.0%} of the template")
    elif abs(best.achieved - best.asked) > config.tolerance:
        notes.append(f"{config.name} came no closer than {best.achieved:.2f}")
    have, all_ = (len(re.findall(r"\d+", text)) for text in (best.text, template.text))
    if config.protect_numbers and have < all_:
        notes.append(f"{have} of {all_} numbers kept; all of them would take {numbers.achieved:.0%} of the template")
    return "; ".join(notes)
