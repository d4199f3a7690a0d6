"""NL2F (NL2Formula, Zhao et al., 2024): a question about a table -> one spreadsheet formula; template after the paper's Figure 6."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.prompt import Template
from pi_ray.protocols import Reject, Row
from pi_ray.run.artifact import digest
from pi_ray.tasks.dataset import fingerprint_files, most_used, select_rows

FILES = {"train": "train.json", "dev": "valid.json", "test": "test.json"}
MAX_ROWS = 20  # data rows shown of a table; the last line then says where the data end, which is what a formula needs of the rest
MAX_CELL = 40  # characters shown of a cell
MAX_WORDS = 60  # of a function's document
NOISE = r"(?m)^ *(Syntax|This function is (part of|available since) .*)$"  # lines of help pages that say nothing about a function


class Nl2fTask:
    """The authors' train.json, valid.json and test.json in `task.folder`: arrays of tables, each with its questions. Groups are the authors' levels.

    With `task.docs`, a JSON Lines file of functions, the template's documents are the functions used most. Scored by the authors' exact match.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.folder = Path(config.folder)

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Raises DataError when files are missing or are not arrays; a Reject's line is the number of the table in the file."""
        return select_rows(self._read, self.config, split)

    def template(self) -> Template:
        """Raises DataError when `task.docs` has no function to use."""
        template = Template.parse(files("pi_ray.tasks").joinpath("nl2f.md").read_text(encoding="utf-8"))
        return Template(template.instruction, self._documents()) if self.config.docs else template

    def score(self, row: Row, output: str) -> dict[str, float]:
        return {"exact_match": float(_compared(output) == _compared(row.answer))}

    def fingerprint(self) -> str:
        return digest([self.template().text, fingerprint_files(self.config, self._paths() if self.config.folder else ())])

    def _documents(self) -> tuple[str, ...]:
        """The functions that all training formulas use most, whatever the row limits."""
        known = _functions(Path(self.config.docs))
        formulas = (row.answer for row in self._read("train") if isinstance(row, Row))
        chosen = most_used((name for formula in formulas for name in called_functions(formula)), known, self.config.docs_count)
        if not chosen:
            raise DataError(
                f"task.docs '{self.config.docs}' describes no function of the training formulas; name another file, or leave task.docs empty for the documents that "
                "ship with the task"
            )
        return tuple(f"## {name}\n{known[name]}" for name in chosen)

    def _paths(self) -> list[Path]:
        return [self.folder / name for name in FILES.values()]

    def _read(self, split: str) -> Iterator[Row | Reject]:
        missing = [path.name for path in self._paths() if not path.is_file()]
        if not self.config.folder or missing:
            raise DataError(
                f"task.folder '{self.config.folder}' lacks {', '.join(missing) or 'the data'}: it must hold train.json, valid.json and test.json as the "
                "authors of NL2Formula publish them on GitHub (timetub/NL2Formula, folder dataset)"
            )
        yield from _rows(self.folder / FILES[split], split)


class _Bad(Exception):
    """Why a table or an entry cannot be used."""


def serialise_table(header: Sequence[str], rows: Sequence[Sequence[str]], end: int) -> str:
    """A sheet as text from which addresses can be derived: column letters with the cells of sheet row 1, then data rows behind their sheet row numbers.

    Shown are all columns, since a formula may name any, at most MAX_ROWS rows, and MAX_CELL characters of a cell. When rows are left out, a last line
    names sheet row `end`, where the data end.
    """
    lines = [" | ".join(f"{column_letters(i)}: {_cell(name)}" for i, name in enumerate(header))]
    lines += [f"{number}: " + " | ".join(map(_cell, row)) for number, row in enumerate(rows[:MAX_ROWS], start=2)]
    if end > len(lines):
        lines.append(f"(data to row {end})")
    return "\n".join(["[TABLE]", *lines, "[/TABLE]"])


def column_letters(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    return (column_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def called_functions(formula: str) -> list[str]:
    """Names of the functions that a formula calls; what stands in quotes does not count."""
    return re.findall(r"([A-Z][A-Z0-9.]*)\(", re.sub(r'"[^"]*"', '""', formula.upper()))


def _compared(formula: str) -> str:
    """The authors' exact match compares lower case without spaces and double quotes. Their gold has no leading "=", so neither may an output."""
    return re.sub('[ "]', "", formula.lower())


def _cell(value: Any) -> str:
    text = " ".join(("" if value is None else str(value)).split())
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _rows(path: Path, split: str) -> Iterator[Row | Reject]:
    for number, table in _tables(path):
        try:
            sheet, entries = _sheet(table), _entries(table)
        except _Bad as bad:
            yield Reject(str(path), number, str(bad))
            continue
        for i, entry in enumerate(entries, start=1):
            try:
                yield _row(entry, sheet, f"{split}-{number}-{i}")
            except _Bad as bad:
                yield Reject(str(path), number, f"t5Formulas entry {i}: {bad}")


def _tables(path: Path) -> Iterator[tuple[int, Any]]:
    """(position from 1, object) of a JSON array. Decoded object by object: the training file has some 68 MB, and as objects many times that."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        between, decode = re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode
        if not text.lstrip().startswith("["):
            raise ValueError("it does not begin with '['")
        at, number = between.match(text, text.index("[") + 1).end(), 1
        while text[at : at + 1] != "]":
            table, at = decode(text, at)
            yield number, table
            at, number = between.match(text, at).end(), number + 1
    except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8
        raise DataError(f"{path}: not a JSON array of tables in UTF-8 ({error}); download it again") from None


def _sheet(table: Any) -> str:
    """`Table` holds the sheet with row 0 of column letters and column 0 of row numbers, which are cut off."""
    cells = table.get("Table") if isinstance(table, dict) else None
    if not isinstance(cells, list) or len(cells) < 2 or not all(isinstance(row, list) and len(row) > 1 for row in cells):
        raise _Bad("'Table' must be a list of at least two rows of two cells or more")
    if cells[0][1] != "A":
        raise _Bad(f"row 0 of 'Table' must hold a blank corner and column letters, found {cells[0][:3]}")
    header, *rows = (row[1:] for row in cells[1:])
    return serialise_table(header, rows, len(rows) + 1)


def _entries(table: dict[str, Any]) -> list[Any]:
    entries = table.get("t5Formulas")
    if not isinstance(entries, list):
        raise _Bad("'t5Formulas' must be a list of questions with their formulas")
    return entries


def _row(entry: Any, sheet: str, name: str) -> Row:
    texts = [entry.get(key) if isinstance(entry, dict) else None for key in ("Question", "Formula2")]
    if not all(isinstance(text, str) and text.strip() and "\0" not in text for text in texts):
        raise _Bad("Question and Formula2 must be texts that are not empty")
    question, formula = (text.strip() for text in texts)
    return Row(name, f"{question}\n{sheet}", formula, str(entry.get("Level") or ""))


def _functions(path: Path) -> dict[str, str]:
    """NAME -> document, from JSON Lines with `function`, `description` and `params`, or with `text`: a help page of one or more functions.

    What a later line says about a function replaces what an earlier one said: overviews come before pages of single functions.
    """
    known: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            data = json.loads(line)
            described = _sections(data["text"]) if "text" in data else [(data["function"], " ".join([data["description"], *data.get("params", ())]))]
            known.update({name.upper(): _short(text) for name, text in described})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"task.docs '{path}' is not a JSON Lines file of functions, each with function and description, or with text ({error!r})") from None
    return known


def _sections(page: str) -> Iterator[tuple[str, str]]:
    """The functions of a help page: a section is headed by a line that is a name in capitals, alone or before the word function."""
    parts = re.split(r"(?m)^ *([A-Z][A-Z0-9.]+)(?: [Ff]unction)? *$", page)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        text = re.sub(NOISE, "", text).strip()
        if len(text.partition("\n")[0].split()) >= 3:  # else a name in a table, not a heading
            yield name, re.sub(r"\s*;\s*", ", ", text)  # help in which semicolons separate arguments


def _short(text: str) -> str:
    """Whole sentences and lines within about MAX_WORDS words; at least the first."""
    kept, words = [], 0
    for piece in re.split(r"(?<=[.!?])\s+|\n+", text.replace("{*} ", "")):
        words += len(piece.split())
        if (kept and words > MAX_WORDS) or re.fullmatch(r" *Examples? *", piece):
            break
        kept.append(piece.strip())
    return " ".join(filter(None, kept))
