"""`pi-ray compress`: a file at some rate, with what was dropped struck through, for people who tune a template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from pi_ray.compress import words
from pi_ray.compress.rate_control import CompressedTemplate
from pi_ray.compress.template import cached_template, compress_template, load_compressors
from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template

if TYPE_CHECKING:
    from rich.console import Console

DROPPED = "strike dim"


def show_compression(file: Path, rate: float, config: RunConfig, console: Console) -> None:
    """Compress a template (or any text) as a run with this config would, and print it."""
    template = Template.load(file)
    tokenizer = load_tokenizer(config.model)
    found = cached_template(template, rate, tokenizer, config.compress)
    if found is None:
        compressor, documents = load_compressors(config.compress)
        found = compress_template(compressor, template, rate, tokenizer, config.compress, documents)
    console.print(strike_dropped_words(template.text, found.text, marks=not console.is_terminal))
    console.print(f"\n{compression_summary(found, config)}", markup=False)


def compression_summary(found: CompressedTemplate, config: RunConfig) -> str:
    note = f"; {found.note}" if found.note else ""
    return (
        f"{config.compress.label}: asked {found.asked:.2f}, achieved {found.achieved:.2f}, "
        f"{found.tokens} of {found.full_tokens} tokens of {Path(config.model.base).name}{note}"
    )


def strike_dropped_words(original: str, compressed: str, marks: bool = False) -> Text:
    """`original` with the words that `compressed` lacks struck through; with `marks` between ~~ as well, for where there are no styles."""
    spans = words.word_spans(original)
    kept = _kept([original[a:b] for a, b in spans], compressed.split())
    edges = [i for i in range(len(spans)) if not i or kept[i] != kept[i - 1] or "\n" in original[spans[i - 1][1] : spans[i][0]]]
    out, at = Text(), 0
    for first, end in zip(edges, [*edges[1:], len(spans)], strict=True):
        start, stop = spans[first][0], spans[end - 1][1]
        piece = original[start:stop]
        out.append(original[at:start])
        out.append(f"~~{piece}~~" if marks and not kept[first] else piece, style="" if kept[first] else DROPPED)
        at = stop
    return out


def _kept(original: list[str], output: list[str]) -> list[bool]:
    """Which words stayed. Of several equal words the output may mean any; next to one that stayed is likelier than the first in the text."""
    places = [i for i, stays in enumerate(words.find_kept_words(original, output)) if stays]
    for n in reversed(range(len(places) - 1)):
        if original[places[n + 1] - 1] == original[places[n]]:
            places[n] = places[n + 1] - 1
    chosen = set(places)
    return [i in chosen for i in range(len(original))]
