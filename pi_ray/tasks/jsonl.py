"""A user's own rows: JSON Lines, or one .json array, in any of the four layouts that fine-tuning data comes in.

Detected for each row:
    pi-ray    {"query", "answer"}, and if wanted "id", "group" and "documents"
    Alpaca    {"instruction", "input", "output"}          query: instruction, and input on the next line
    ShareGPT  {"conversations": [{"from", "value"}, ...]}
    OpenAI    {"messages": [{"role", "content"}, ...]}
A conversation's last user turn is the query and the turn after it the answer. Earlier turns are left out, and so is the
system message: the template takes its place. Blank lines and lines that begin with `//` or `#` are comments.

"documents" come with the row, such as passages retrieved for it: a list of texts or of {"title", "text"}. They stand
before its query.
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
from pi_ray.tasks.dataset import UnusableRow, fingerprint_files, limit_rows
from pi_ray.tasks.metrics import exact_match

MAX_FIELD = 1 << 20  # bytes of one field
MAX_LINE = 8 << 20  # bytes of one line; a longer one is skipped without being held in memory
CONVERSATIONS = {"conversations": ("from", "value"), "messages": ("role", "content")}
USER, ASSISTANT = ("user", "human"), ("assistant", "gpt", "model")
TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class JsonlTask:
    """Rows from `task.train`, `task.dev`, `task.test`; template from `task.template`; scored by exact match."""

    def __init__(self, config: TaskConfig):
        self.config = config

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Raises DataError when the training or test file is missing; without a dev file there are no dev rows."""
        path = Path(self.config.queries if split == UNLABELLED else getattr(self.config, split))
        if path.is_file():
            yield from limit_rows(lambda: _read_rows(path, split), getattr(self.config.rows, split))
        elif split not in ("dev", UNLABELLED):
            raise DataError(
                f"{path}: no such file; put the {split} rows there, or name another file with task.{split} "
                "('pi-ray init FOLDER' writes a sample)"
            )

    def template(self) -> Template:
        return Template.load(Path(self.config.template))

    def score(self, row: Row, output: str) -> dict[str, float]:
        return {"exact_match": exact_match(output, row.answer)}

    def fingerprint(self) -> str:
        paths = [Path(getattr(self.config, name)) for name in (*SPLITS, "queries", "template")]
        return fingerprint_files(self.config, paths)


def _read_rows(path: Path, split: str) -> Iterator[Row | Reject]:
    """All rows of a file. Ids must differ within it; the ids are all that is remembered of earlier rows."""
    seen: set[str] = set()
    for number, content in _array(path) if _is_array(path) else _lines(path):
        try:
            row = _row(content, f"{split}-{number}", labelled=split != UNLABELLED)
            if row.id in seen:
                raise UnusableRow(f"duplicate id '{row.id}'")
            seen.add(row.id)
            yield row
        except UnusableRow as reason:
            yield Reject(str(path), number, str(reason))


def _is_array(path: Path) -> bool:
    with open(path, "rb") as f:
        return path.suffix == ".json" and f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    """(position from 1, object) of a JSON array, which is loaded whole."""
    try:
        yield from enumerate(json.loads(path.read_bytes().decode("utf-8-sig")), start=1)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a JSON array in UTF-8 ({error}); JSON Lines, one object a line, loses only the bad line"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of the lines that are not comments, cut after MAX_LINE + 1 bytes."""
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


def _row(content: Any, default_id: str, labelled: bool) -> Row:
    """One line (bytes) or one object of an array -> Row, with an empty answer unless `labelled`. Raises UnusableRow."""
    data = _parse(content) if isinstance(content, bytes) else content
    if not isinstance(data, dict):
        raise UnusableRow(f"wrong type: expected an object with query and answer, found {_type(data)}")
    query, answer = _query_answer(data, labelled)
    given = data.get("id", default_id)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise UnusableRow(f"wrong type: 'id' must be text or a whole number, found {_type(given)}")
    group = "" if data.get("group") in (None, "") else _text("group", data["group"])
    answer = _text("answer", answer) if labelled else ""
    return Row(_text("id", str(given)), _text("query", query), answer, group, _documents(data.get("documents")))


def _parse(line: bytes) -> Any:
    if len(line) > MAX_LINE:
        raise UnusableRow(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnusableRow(f"not UTF-8: byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
        raise UnusableRow(f"not valid JSON (cut off, or two objects on one line?): {error}") from None


def _query_answer(data: dict[str, Any], labelled: bool) -> tuple[Any, Any]:
    """The two fields, not yet checked, in whichever layout the row has; the answer is read only if `labelled`."""
    if "query" in data or "answer" in data:
        return _field(data, "query"), _field(data, "answer") if labelled else ""
    for name, (role, text) in CONVERSATIONS.items():
        if name in data:
            return _last_turns(name, data[name], role, text, labelled)
    if "instruction" in data:
        query, given = _text("instruction", data["instruction"]), data.get("input") or ""
        query = f"{query}\n{_text('input', given)}" if given else query
        return query, _field(data, "output") if labelled else ""
    raise UnusableRow(
        "missing field: a row has query and answer, or instruction and output, or conversations, or messages"
    )


def _last_turns(field: str, turns: Any, role: str, text: str, labelled: bool) -> tuple[Any, Any]:
    """The last user's turn and the answer after it; without `labelled` a conversation may end with the user's turn."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableRow(f"wrong type: '{field}' must be a list of objects with {role} and {text}")
    users = [i for i, turn in enumerate(turns) if turn.get(role) in USER]
    if not labelled:
        if not users:
            raise UnusableRow(f"missing field: '{field}' has no user's turn")
        return _field(turns[users[-1]], text), ""
    if not users or users[-1] + 1 >= len(turns) or turns[users[-1] + 1].get(role) not in ASSISTANT:
        raise UnusableRow(f"missing field: '{field}' must end with a user's turn and its answer")
    return _field(turns[users[-1]], text), _field(turns[users[-1] + 1], text)


def _documents(given: Any) -> tuple[str, ...]:
    """Each document as text, with its title as a heading."""
    if given is None:
        return ()
    if not isinstance(given, list):
        expected = "a list of texts or of objects with title and text"
        raise UnusableRow(f"wrong type: 'documents' must be {expected}, found {_type(given)}")
    return tuple(_document(f"documents[{i}]", document) for i, document in enumerate(given))


def _document(name: str, given: Any) -> str:
    if not isinstance(given, dict):
        return _text(name, given).strip()
    text = _text(f"{name}.text", _field(given, "text")).strip()
    title = given.get("title")
    return text if title in (None, "") else f"## {_text(f'{name}.title', title).strip()}\n{text}"


def _field(data: dict[str, Any], name: str) -> Any:
    if name not in data:
        raise UnusableRow(f"missing field '{name}'")
    return data[name]


def _text(name: str, value: Any) -> str:
    """`value` when it is usable text, else UnusableRow."""
    if not isinstance(value, str):
        raise UnusableRow(f"wrong type: '{name}' must be text, found {_type(value)}")
    if not value.strip():
        raise UnusableRow(f"'{name}' is empty")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise UnusableRow(f"'{name}' holds half of a surrogate pair, which is not a character") from None
    if size > MAX_FIELD:
        raise UnusableRow(f"'{name}' has {size:,} bytes; at most {MAX_FIELD:,} are taken")
    if "\0" in value:
        raise UnusableRow(f"'{name}' holds a NUL character")
    return value


def _type(value: Any) -> str:
    return TYPES.get(type(value), "a number")
