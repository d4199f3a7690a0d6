"""A user's own rows: JSON Lines, or one .json array, in any of the four layouts that fine-tuning data comes in.

Detected for each row:
    pi-ray    {"query", "answer"}, and if wanted "id", "group" and "documents"
    Alpaca    {"instruction", "input", "output"}          query: instruction, and input on the next line
    ShareGPT  {"conversations": [{"from", "value"}, ...]}
    OpenAI    {"messages": [{"role", "content"}, ...]}
A conversation's last user turn is the query and the turn after it the answer, as text or as parts of text. The template
takes the place of the system message and earlier turns. "documents", such as passages retrieved for the row, stand
before its query: a list of texts or of {"title", "text"}. Blank lines and lines that begin with `//` or `#` are
comments.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pi_ray.config import TaskConfig
from pi_ray.conversation import content_text
from pi_ray.errors import DataError
from pi_ray.metrics import RowScorer
from pi_ray.prompt import Template
from pi_ray.protocols import SPLITS, UNLABELLED, Reject, Row
from pi_ray.run.answered import may_be_missing
from pi_ray.tasks.dataset import fingerprint_files, limit_rows, read_array

MAX_FIELD = 1 << 20  # bytes of one field
MAX_LINE = 8 << 20  # bytes of one line; a longer one is skipped without being held in memory
CONVERSATIONS = {"conversations": ("from", "value"), "messages": ("role", "content")}
USER, ASSISTANT = ("user", "human"), ("assistant", "gpt", "model")
TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class JsonlTask:
    """Rows from `task.train`, `task.dev`, `task.test`; template from `task.template`; scored by `task.metric`.

    Raises ConfigError for a metric that cannot work with its settings.
    """

    def __init__(self, config: TaskConfig):
        self.config, self.scorer = config, RowScorer(config)

    def rows(self, split: str) -> Iterator[Row | Reject]:
        """Raises DataError for a dev or test row that a metric cannot score, and when a named file is missing; dev rows
        and queries may be missing under their default names.
        """
        key = "queries" if split == UNLABELLED else split
        named = getattr(self.config, key)
        path = Path(named)
        if path.is_file():
            yield from limit_rows(lambda: self._checked(path, split), getattr(self.config.rows, split))
        elif named and not (split in ("dev", UNLABELLED) and may_be_missing(path, key)):
            rows = "queries" if split == UNLABELLED else f"{split} rows"
            other = f"name another file with task.{key} ('pi-ray init FOLDER' writes a sample)"
            raise DataError(f"{path}: no such file; put the {rows} there, or {other}")

    def _checked(self, path: Path, split: str) -> Iterator[Row | Reject]:
        is_scored = split in ("dev", "test") or (split == "train" and not Path(self.config.dev).is_file())
        for row in self.read_file(path, split):  # training rows serve as dev rows where there are none
            if is_scored and isinstance(row, Row) and (reason := self.scorer.check(row)):
                raise DataError(f"{path}: row '{row.id}': {reason}")
            yield row

    def read_file(self, path: Path, split: str) -> Iterator[Row | Reject]:
        """The rows of one file, as they come."""
        return _read_rows(path, split)

    def template(self) -> Template:
        return Template.load(Path(self.config.template))

    def score(self, row: Row, output: str) -> dict[str, float]:
        return self.score_all([row], [output])[0]

    def score_all(self, rows: Sequence[Row], outputs: Sequence[str]) -> list[dict[str, float]]:
        return self.scorer.score_all(rows, outputs)

    def fingerprint(self) -> str:
        paths = [Path(getattr(self.config, name)) for name in (*SPLITS, "queries", "template")]
        return fingerprint_files(self.config, paths)


def _read_rows(path: Path, split: str) -> Iterator[Row | Reject]:
    """All rows of a file. Ids must differ within it; the ids are all that is remembered of earlier rows."""
    seen: set[str] = set()
    for number, content in read_contents(path):
        try:
            row = _row(content, f"{split}-{number}", labelled=split != UNLABELLED)
            if row.id in seen:
                raise ValueError(f"duplicate id '{row.id}'")
            seen.add(row.id)
            yield row
        except ValueError as reason:
            yield Reject(str(path), number, str(reason))


def read_contents(path: Path) -> Iterator[tuple[int, Any]]:
    """(position, object) in an array, else (number, bytes) of lines that are no comments, cut after MAX_LINE + 1."""
    with open(path, "rb") as f:
        begins = f.read(4096)
        if path.suffix == ".json" and begins.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            yield from read_array(path, "JSON Lines, one object a line, loses only the bad line")
            return
        f.seek(len(BOM_UTF8) if begins.startswith(BOM_UTF8) else 0)
        for number in count(1):
            line = rest = f.readline(MAX_LINE + 1)
            if not line:
                return
            while rest and not rest.endswith(b"\n"):
                rest = f.readline(MAX_LINE)
            if line.strip() and not line.lstrip().startswith((b"//", b"#")):
                yield number, line


def _row(content: Any, default_id: str, labelled: bool) -> Row:
    """One line (bytes) or one object of an array -> Row, with an empty answer unless `labelled`. Raises ValueError."""
    data = parse_line(content) if isinstance(content, bytes) else content
    if not isinstance(data, dict):
        raise ValueError(f"wrong type: expected an object with query and answer, found {_type(data)}")
    query, answer = _query_answer(data, labelled)
    given = data.get("id", default_id)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise ValueError(f"wrong type: 'id' must be text or a whole number, found {_type(given)}")
    group = "" if data.get("group") in (None, "") else _text("group", data["group"])
    documents = () if data.get("documents") is None else tuple(_documents(data["documents"]))
    answer = _text("answer", answer) if labelled else ""
    return Row(_text("id", str(given)), _text("query", query), answer, group, documents)


def parse_line(line: bytes) -> Any:
    """The JSON value of a line of `read_contents`. Raises ValueError with the reason where there is none."""
    if len(line) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
        raise ValueError(f"not valid JSON (cut off, or two objects on one line?): {error}") from None


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
    expected = "query and answer, or instruction and output, or conversations, or messages"
    raise ValueError(f"missing field: a row has {expected}")


def _last_turns(field: str, turns: Any, role: str, text: str, labelled: bool) -> tuple[Any, Any]:
    """The last user's turn and the answer after it; without `labelled` a conversation may end with the user's turn."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"wrong type: '{field}' must be a list of objects with {role} and {text}")
    last = max((i for i, turn in enumerate(turns) if turn.get(role) in USER), default=None)
    if last is None and not labelled:
        raise ValueError(f"missing field: '{field}' has no user's turn")
    if last is None or (labelled and not [t for t in turns[last + 1 : last + 2] if t.get(role) in ASSISTANT]):
        raise ValueError(f"missing field: '{field}' must end with a user's turn and its answer")
    answer = _turn_text(field, turns, last + 1, text) if labelled else ""
    return _turn_text(field, turns, last, text), answer


def _turn_text(field: str, turns: Any, i: int, text: str) -> Any:
    """The text of a turn, of which OpenAI's messages may have several parts. Raises ValueError for an image."""
    value = _field(turns[i], text)
    return content_text(value, f"{field}[{i}].{text}") if isinstance(value, list) else value


def _documents(given: Any) -> Iterator[str]:
    """Each document as text, with its title as a heading."""
    if not isinstance(given, list):
        expected = "a list of texts or of objects with title and text"
        raise ValueError(f"wrong type: 'documents' must be {expected}, found {_type(given)}")
    for i, document in enumerate(given):
        name = f"documents[{i}]"
        if not isinstance(document, dict):
            yield _text(name, document).strip()
            continue
        text, title = _text(f"{name}.text", _field(document, "text")).strip(), document.get("title")
        yield text if title in (None, "") else f"## {_text(f'{name}.title', title).strip()}\n{text}"


def _field(data: dict[str, Any], name: str) -> Any:
    if name not in data:
        raise ValueError(f"missing field '{name}'")
    return data[name]


def _text(name: str, value: Any) -> str:
    """`value` when it is usable text, else ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"wrong type: '{name}' must be text, found {_type(value)}")
    if not value.strip():
        raise ValueError(f"'{name}' is empty")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(f"'{name}' holds half of a surrogate pair, which is not a character") from None
    if size > MAX_FIELD:
        raise ValueError(f"'{name}' has {size:,} bytes; at most {MAX_FIELD:,} are taken")
    if "\0" in value:
        raise ValueError(f"'{name}' holds a NUL character")
    return value


def _type(value: Any) -> str:
    return TYPES.get(type(value), "a number")
