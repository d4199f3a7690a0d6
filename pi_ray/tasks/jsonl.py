"""A user's own rows: JSON Lines, or one .json array, in any of the four layouts that fine-tuning data comes in.

Detected for each row:
    pi-ray    {"query", "answer"}, and if wanted "id", "group" and "documents"
    Alpaca    {"instruction", "input", "output"}          query: instruction, and input on the next line
    ShareGPT  {"conversations": [{"from", "value"}, ...]}
    OpenAI    {"messages": [{"role", "content"}, ...]}
Of a conversation the last user turn is the query and the turn after it the answer. Earlier turns are left out, and so is the system
message: the template takes its place. Blank lines and lines that begin with `//` or `#` are comments.

"documents" come with the row, such as passages retrieved for it: a list of texts or of {"title", "text"}. They stand before its query.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.errors import DataError
from pi_ray.prompt import Template
from pi_ray.protocols import SPLITS, UNLABELLED, Reject, Row
from pi_ray.tasks.dataset import fingerprint_files, limit_rows
from pi_ray.tasks.metrics import exact_match

MAX_FIELD = 1 << 20  # bytes of one field
MAX_LINE = 8 << 20  # bytes of one line; what is longer is skipped without being held in memory
USER, ASSISTANT = ("user", "human"), ("assistant", "gpt", "model")


class JsonlTask:
    """Rows from `task.train`, `task.dev`, `task.test`; template from `task.template`; scored by exact match."""

    def __init__(self, config: TaskConfig):
        self.config = config

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Raises DataError when the training or test file is missing; without a dev file there are no dev rows."""
        path = Path(self.config.queries if split == UNLABELLED else getattr(self.config, split))
        if path.is_file():
            yield from limit_rows(lambda: _read(path, split), getattr(self.config.rows, split))
        elif split not in ("dev", UNLABELLED):
            raise DataError(f"{path}: no such file; put the {split} rows there, or name another file with task.{split} ('pi-ray init FOLDER' writes a sample)")

    def template(self) -> Template:
        return Template.load(Path(self.config.template))

    def score(self, row: Row, output: str) -> dict[str, float]:
        return {"exact_match": exact_match(output, row.answer)}

    def fingerprint(self) -> str:
        return fingerprint_files(self.config, [Path(getattr(self.config, name)) for name in (*SPLITS, "queries", "template")])


class _Bad(Exception):
    """Why one row cannot be used."""


def _read(path: Path, split: str) -> Iterator[Row | Reject]:
    """All rows of a file. Ids must differ within it; the ids are all that is remembered of earlier rows."""
    seen: set[str] = set()
    for number, content in _array(path) if _is_array(path) else _lines(path):
        try:
            row = _row(content, f"{split}-{number}", labelled=split != UNLABELLED)
            if row.id in seen:
                raise _Bad(f"duplicate id '{row.id}'")
        except _Bad as bad:
            yield Reject(str(path), number, str(bad))
        else:
            seen.add(row.id)
            yield row


def _is_array(path: Path) -> bool:
    with open(path, "rb") as f:
        return path.suffix == ".json" and f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    """(position from 1, object) of a JSON array, which is loaded whole."""
    try:
        yield from enumerate(json.loads(path.read_bytes().decode("utf-8-sig")), start=1)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array in UTF-8 ({error}); JSON Lines, one object a line, loses only the bad line") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of the lines that are not comments; of a line above MAX_LINE the beginning."""
    with open(path, "rb") as f:
        number = 0
        while line := f.readline(MAX_LINE + 1):
            number += 1
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = f.readline(MAX_LINE)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            if line.strip() and not line.lstrip().startswith((b"//", b"#")):
                yield number, line


def _row(content: Any, default_id: str, labelled: bool = True) -> Row:
    """One line (bytes) or one object of an array -> Row, without its answer when it is to be unlabelled. Raises _Bad."""
    data = _parse(content) if isinstance(content, bytes) else content
    if not isinstance(data, dict):
        raise _Bad(f"wrong type: expected an object with query and answer, found {_type(data)}")
    query, answer = _query_answer(data) if labelled else (_query(data), None)
    given = data.get("id", default_id)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise _Bad(f"wrong type: 'id' must be text or a whole number, found {_type(given)}")
    return Row(_text("id", str(given)), _text("query", query), _text("answer", answer) if labelled else "", _group(data), _documents(data))


def _parse(line: bytes) -> Any:
    if len(line) > MAX_LINE:
        raise _Bad(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Bad(f"not UTF-8: byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
        raise _Bad(f"not valid JSON (cut off, or two objects on one line?): {error}") from None


def _query_answer(data: dict[str, Any]) -> tuple[Any, Any]:
    """The two fields, not yet checked, in whichever layout the row has."""
    if "query" in data or "answer" in data:
        return _field(data, "query"), _field(data, "answer")
    if "conversations" in data:
        return _last_turn(data, "conversations", "from", "value")
    if "messages" in data:
        return _last_turn(data, "messages", "role", "content")
    if "instruction" in data:
        instruction, given = _text("instruction", data["instruction"]), data.get("input") or ""
        return (f"{instruction}\n{_text('input', given)}" if given else instruction), _field(data, "output")
    raise _Bad("missing field: a row has query and answer, or instruction and output, or conversations, or messages")


def _query(data: dict[str, Any]) -> Any:
    """The query alone; a conversation may end with it."""
    for field, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if isinstance(turns := data.get(field), list):
            asked = [turn for turn in turns if isinstance(turn, dict) and turn.get(role) in USER]
            if not asked:
                raise _Bad(f"missing field: '{field}' has no user's turn")
            return _field(asked[-1], text)
    return _query_answer({**data, "answer" if "query" in data else "output": ""})[0]


def _last_turn(data: dict[str, Any], field: str, role: str, text: str) -> tuple[Any, Any]:
    turns = data[field]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Bad(f"wrong type: '{field}' must be a list of objects with {role} and {text}")
    asked = [i for i, turn in enumerate(turns) if turn.get(role) in USER]
    if not asked or asked[-1] + 1 >= len(turns) or turns[asked[-1] + 1].get(role) not in ASSISTANT:
        raise _Bad(f"missing field: '{field}' must end with a user's turn and its answer")
    return _field(turns[asked[-1]], text), _field(turns[asked[-1] + 1], text)


def _group(data: dict[str, Any]) -> str:
    group = data.get("group")
    return "" if group in (None, "") else _text("group", group)


def _documents(data: dict[str, Any]) -> tuple[str, ...]:
    """Each as text, a title as a heading over it."""
    given = data.get("documents")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise _Bad(f"wrong type: 'documents' must be a list of texts or of objects with title and text, found {_type(given)}")
    return tuple(_document(f"documents[{i}]", document) for i, document in enumerate(given))


def _document(name: str, given: Any) -> str:
    if not isinstance(given, dict):
        return _text(name, given).strip()
    text = _text(f"{name}.text", _field(given, "text")).strip()
    title = given.get("title")
    return text if title in (None, "") else f"## {_text(f'{name}.title', title).strip()}\n{text}"


def _field(data: dict[str, Any], name: str) -> Any:
    if name not in data:
        raise _Bad(f"missing field '{name}'")
    return data[name]


def _text(name: str, value: Any) -> str:
    """`value` when it is usable text, else _Bad."""
    if not isinstance(value, str):
        raise _Bad(f"wrong type: '{name}' must be text, found {_type(value)}")
    if not value.strip():
        raise _Bad(f"'{name}' is empty")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise _Bad(f"'{name}' holds half of a surrogate pair, which is not a character") from None
    if size > MAX_FIELD:
        raise _Bad(f"'{name}' has {size:,} bytes; at most {MAX_FIELD:,} are taken")
    if "\0" in value:
        raise _Bad(f"'{name}' holds a NUL character")
    return value


def _type(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
