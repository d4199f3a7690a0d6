"""Output of `pi-ray compress`: a text with the words struck through that a rate drops, for tuning a template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from pi_ray.compress import words
from pi_ray.compress.template import compress_template
from pi_ray.config import RunConfig
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template

if TYPE_CHECKING:
    from rich.console import Console


def show_compression(file: Path, rate: float, config: RunConfig, console: Console) -> None:
    """Compress a template (or any text) as a run with this config would, and print it."""
    template = Template.load(file)
    found = compress_template(template, rate, load_tokenizer(config.model), config.compress)
    console.print(strike_dropped_words(template.text, found.text, marks=not console.is_terminal))
    console.print(
        f"\n{config.compress.label}: asked {found.asked:.2f}, achieved {found.achieved:.2f}, {found.tokens} of "
        f"{found.full_tokens} tokens of {Path(config.model.base).name}{f'; {found.note}' if found.note else ''}",
        markup=False,
    )


def strike_dropped_words(original: str, compressed: str, marks: bool = False) -> Text:
    """`original` with the dropped words struck through; with `marks` also put between ~~, for plain text."""
    spans = words.word_spans(original)
    kept = find_kept_adjacent([original[a:b] for a, b in spans], compressed.split())
    out, at = Text(), 0
    first = 0
    for i in range(1, len(spans) + 1):
        if i < len(spans) and kept[i] == kept[first] and "\n" not in original[spans[i - 1][1] : spans[i][0]]:
            continue
        start, stop = spans[first][0], spans[i - 1][1]
        piece = original[start:stop]
        out.append(original[at:start])
        out.append(f"~~{piece}~~" if marks and not kept[first] else piece, style="" if kept[first] else "strike dim")
        at, first = stop, i
    return out


def find_kept_adjacent(original: list[str], output: list[str]) -> list[bool]:
    """Which words were kept: of several equal ones, the one that stands next to the following kept word."""
    places = [i for i, stays in enumerate(words.find_kept_words(original, output)) if stays]
    for n in reversed(range(len(places) - 1)):
        if original[places[n + 1] - 1] == original[places[n]]:
            places[n] = places[n + 1] - 1
    chosen = set(places)
    return [i in chosen for i in range(len(original))]
