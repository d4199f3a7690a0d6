"""Output of `pi-ray compress`: a text with the words struck through that a rate drops, for tuning a template."""

from contextlib import suppress
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pi_ray.compress import words
from pi_ray.compress.template import compress_template
from pi_ray.config import RunConfig
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template, load_tools


def show_compression(file: Path, rate: float, config: RunConfig, console: Console) -> None:
    """Compress a template (or tools, or any text) as a run with this config would, and print it."""
    template = _load(file)
    found = compress_template(template, rate, load_tokenizer(config.model), config.compress)
    console.print(strike_dropped_words(template.text, found.text, marks=not console.is_terminal))
    console.print(
        f"\n{config.compress.label}: asked {found.asked:.2f}, achieved {found.achieved:.2f}, {found.tokens} of "
        f"{found.full_tokens} tokens of {Path(config.model.base).name}{f'; {found.note}' if found.note else ''}",
        markup=False,
    )


def _load(file: Path) -> Template:
    """The template in a file, or the tools in one that holds tool definitions."""
    if file.suffix == ".json":
        with suppress(DataError):
            return Template("", (), load_tools(file))
    return Template.load(file)


def strike_dropped_words(original: str, compressed: str, marks: bool = False) -> Text:
    """`original` with the dropped words struck through; with `marks` also put between ~~, for plain text."""
    out, kept = Text(), iter(find_kept_adjacent(original.split(), compressed.split()))
    for line in original.splitlines(keepends=True):
        at = 0
        for stays, run in groupby(words.word_spans(line), key=lambda span: next(kept)):
            spans = list(run)
            start, stop = spans[0][0], spans[-1][1]
            piece = line[start:stop]
            out.append(line[at:start])
            out.append(f"~~{piece}~~" if marks and not stays else piece, style="" if stays else "strike dim")
            at = stop
        out.append(line[at:])
    return out


def find_kept_adjacent(original: list[str], output: list[str]) -> list[bool]:
    """Which words were kept: of several equal ones, the one that stands next to the following kept word."""
    places = [i for i, stays in enumerate(words.find_kept_words(original, output)) if stays]
    for n in reversed(range(len(places) - 1)):
        if original[places[n + 1] - 1] == original[places[n]]:
            places[n] = places[n + 1] - 1
    chosen = set(places)
    return [i in chosen for i in range(len(original))]
