"""NL2F (NL2Formula, Zhao et al., 2024): a table and a question -> a formula; template after the paper's Figure 6."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pi_ray.errors import DataError
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.dataset import DatasetTask, read_array

FILES = {"train": "train.json", "dev": "valid.json", "test": "test.json"}
MAX_ROWS = 20  # data rows shown of a table; of the rest a formula needs only the number of the last one
MAX_CELL = 40  # characters shown of a cell
MAX_WORDS = 60  # of a function's document


class Nl2fTask(DatasetTask):
    """The authors' train.json, valid.json and test.json in `task.folder`: arrays of tables, each with its questions.

    Groups are the authors' levels; a Reject's line is the number of the table in the file. With `task.docs`, a JSON
    Lines file of functions, the template's documents are the functions used most. Scored by the authors' exact match.
    """

    template_file = "nl2f.md"
    data_files = tuple(FILES.values())
    must_hold = "the files that the authors of NL2Formula publish on GitHub (timetub/NL2Formula, folder dataset)"

    def score(self, row: Row, output: str) -> dict[str, float]:
        return {"exact_match": float(_normalise(output) == _normalise(row.answer))}

    def documents(self) -> tuple[str, ...]:
        known = _read_functions(Path(self.config.docs))
        unused = "describes no function of the training formulas; name another file, or none for the task's own"
        return tuple(f"## {name}\n{known[name]}" for name in self.most_used(called_functions, known, unused))

    def read_split(self, split: str) -> Iterator[Row | Reject]:
        self.require_files()
        path = self.folder / FILES[split]
        for number, table in read_array(path, "download the tables again"):
            try:
                sheet, entries = _sheet(table), table.get("t5Formulas")
                if not isinstance(entries, list):
                    raise ValueError("'t5Formulas' must be a list of questions with their formulas")
            except ValueError as reason:
                yield Reject(str(path), number, str(reason))
                continue
            for i, entry in enumerate(entries, start=1):
                data = entry if isinstance(entry, dict) else {}
                question, formula = (_text(data.get(key)) for key in ("Question", "Formula2"))
                if question and formula:
                    yield Row(f"{split}-{number}-{i}", f"{question}\n{sheet}", formula, str(data.get("Level") or ""))
                else:
                    problem = f"t5Formulas entry {i}: Question and Formula2 must be texts that are not empty"
                    yield Reject(str(path), number, problem)


def serialise_table(header: Sequence[str], rows: Sequence[Sequence[str]], end: int) -> str:
    """All columns of a sheet, with their letters and row numbers; a last line names `end` where rows are left out."""
    lines = [" | ".join(f"{column_letters(i)}: {_cell(name)}" for i, name in enumerate(header))]
    lines += [f"{number}: " + " | ".join(map(_cell, row)) for number, row in enumerate(rows[:MAX_ROWS], start=2)]
    if end > len(lines):
        lines.append(f"(data to row {end})")
    return "\n".join(["[TABLE]", *lines, "[/TABLE]"])


def column_letters(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    return (column_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def called_functions(formula: str) -> list[str]:
    """Names of the functions that a formula calls; text in quotes does not count."""
    return re.findall(r"([A-Z][A-Z0-9.]*)\(", re.sub(r'"[^"]*"', '""', formula.upper()))


def _normalise(formula: str) -> str:
    """A formula as the authors compare it: in lower case, without spaces and double quotes. A leading "=" counts."""
    return re.sub('[ "]', "", formula.lower())


def _cell(value: Any) -> str:
    text = " ".join(("" if value is None else str(value)).split())
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) and "\0" not in value else ""


def _sheet(table: Any) -> str:
    """The serialised `Table`, whose row 0 of column letters and column 0 of row numbers are cut off."""
    cells = table.get("Table") if isinstance(table, dict) else None
    rows = cells if isinstance(cells, list) else []
    if len(rows) < 2 or not all(isinstance(row, list) and len(row) > 1 for row in rows):
        raise ValueError("'Table' must be a list of at least two rows of two cells or more")
    if rows[0][1] != "A":
        raise ValueError(f"row 0 of 'Table' must hold a blank corner and column letters, found {rows[0][:3]}")
    header, *data = (row[1:] for row in rows[1:])
    return serialise_table(header, data, len(data) + 1)


def _read_functions(path: Path) -> dict[str, str]:
    """NAME -> document, from JSON Lines with `function`, `description` and `params`, or with a help page as `text`."""
    known: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            data = json.loads(line)
            if "text" in data:
                described = list(_split_help_page(data["text"]))
            else:
                described = [(data["function"], " ".join([data["description"], *data.get("params", ())]))]
            known.update({name.upper(): _shorten(text) for name, text in described})  # overviews come first
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "a JSON Lines file of functions, each with function and description, or with text"
        raise DataError(f"task.docs '{path}' is not {expected} ({error!r})") from None
    return known


def _split_help_page(page: str) -> Iterator[tuple[str, str]]:
    """(function, its section): sections begin with a line that is a name in capitals, with or without "function"."""
    parts = re.split(r"(?m)^ *([A-Z][A-Z0-9.]+)(?: [Ff]unction)? *$", page)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        text = re.sub(r"(?m)^ *(Syntax|This function is (part of|available since) .*)$", "", text).strip()
        if len(text.partition("\n")[0].split()) >= 3:  # else a name in a table, not a heading
            yield name, re.sub(r"\s*;\s*", ", ", text)  # semicolons separate arguments in help pages


def _shorten(text: str) -> str:
    """Whole sentences and lines within about MAX_WORDS words; at least the first."""
    kept: list[str] = []
    count = 0
    for piece in re.split(r"(?<=[.!?])\s+|\n+", text.replace("{*} ", "")):
        count += len(piece.split())
        if (kept and count > MAX_WORDS) or re.fullmatch(r" *Examples? *", piece):
            break
        kept.append(piece.strip())
    return " ".join(filter(None, kept))
