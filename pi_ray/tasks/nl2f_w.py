"""NL2F-W: spreadsheet formulas made from WikiSQL (Zhong et al., 2017), the main source of NL2Formula. A substitute, never to be reported as NL2F.

A question, its table's header and its SQL become a row: SELECT MAX(c0) WHERE c2 = 'v' AND c3 > 5 -> MAX(FILTER(A2:A100,(C2:C100="v")*(D2:D100>5))).
A table is its header, in which "(number)" marks numeric columns, and the row where it ends. Cells are not used: one of the two sources lacks them.

From `task.folder`: dev.jsonl (questions, SQL) and validation.headers.txt (columns and types of the same questions in the same order). Columns and types
are at hand for WikiSQL's dev part only; lists of its training queries name no more than the columns that queries use (with gaps in three of four tables,
and without types), which would give answers away. So the 8,421 dev questions are split anew, about 75/10/15 as NL2F is (paper A.1), by the hash of
their Wikipedia page: no page, and so no table, stands on two sides. Every table is taken to end at row LAST_ROW.
Without `task.folder`: Salesforce/wikisql on the hub, with its own splits and the real ends of its tables. Scores from the two do not compare.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pi_ray.errors import DataError
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.dataset import load_hub_rows
from pi_ray.tasks.nl2f import Nl2fTask, column_letters, serialise_table

FILES = ("dev.jsonl", "validation.headers.txt")
HUB = "Salesforce/wikisql"
LAST_ROW = 100
AGGREGATES, COMPARISONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVERAGE"), ("=", ">", "<")  # WikiSQL's numbers for them
GROUPS = ("no condition", "one condition", "several conditions")

Header = Sequence[tuple[str, str]]  # name and type, "text" or "real", of each column
Conditions = Sequence[tuple[int, int, Any]]  # column, comparison, value


class Nl2fWTask(Nl2fTask):
    """Template, documents and metric are those of nl2f; groups are the numbers of conditions."""

    def _paths(self) -> list[Path]:
        return [self.folder / name for name in FILES]

    def _read(self, split: str) -> Iterator[Row | Reject]:
        if not self.config.folder:
            yield from _hub_rows(split)
            return
        missing = [path.name for path in self._paths() if not path.is_file()]
        if missing:
            raise DataError(
                f"task.folder '{self.config.folder}' lacks {', '.join(missing)}: it must hold WikiSQL's dev.jsonl (salesforce/WikiSQL on GitHub) and "
                "validation.headers.txt (cycycc/nl2sql on GitHub, data/wikisql/bigquery/validation.txt). Without task.folder the data comes from the hub"
            )
        yield from _folder_rows(*self._paths(), split)


def sql_to_formula(header: Header, select: int, aggregate: int, conditions: Conditions, end: int) -> str:
    """WikiSQL's SQL -> a formula over rows 2 to `end`. Raises IndexError for a column, aggregate or comparison that is not there."""
    tests = "*".join(f"({_range(header, c, end)}{COMPARISONS[comparison]}{_value(value, header[c][1])})" for c, comparison, value in conditions)
    cells = _range(header, select, end)
    selected = f"FILTER({cells},{tests})" if tests else cells
    name = AGGREGATES[aggregate]
    if name == "COUNT" and header[select][1] != "real":
        name = "COUNTA"  # a spreadsheet's COUNT sees numbers only
    return f"{name}({selected})" if name else selected


def split_of_table(table: str) -> str:
    """The split of a table such as 1-10015132-11, by the number of its page in the middle."""
    page = re.sub(r"^\d-|-\d+$", "", table)
    share = int(hashlib.sha256(page.encode()).hexdigest(), 16) % 100
    return "train" if share < 75 else "dev" if share < 85 else "test"


def _range(header: Header, index: int, end: int) -> str:
    if not 0 <= index < len(header):
        raise IndexError(f"the SQL names column {index} of a table with {len(header)}")
    return f"{column_letters(index)}2:{column_letters(index)}{end}"


def _value(value: Any, kind: str) -> str:
    """Text in quotes, doubled inside. In a numeric column a bare number, also when it is written 24,637 or 56,6."""
    text = str(value)
    grouped = re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text)
    number = text.replace(",", "" if grouped else ".").removesuffix(".0")
    if kind == "real" and re.fullmatch(r"-?\d*\.?\d+(e[+-]?\d+)?", number):
        return number
    return '"' + text.replace('"', '""') + '"'


def _folder_rows(questions: Path, headers: Path, split: str) -> Iterator[Row | Reject]:
    blocks = headers.read_text(encoding="utf-8").split("\n--SEPARATOR--\n")
    lines = questions.read_text(encoding="utf-8").split("\n")
    lines, blocks = [x for x in lines if x.strip()], [x for x in blocks if x.strip()]
    if len(lines) != len(blocks):
        raise DataError(f"{questions} has {len(lines)} questions and {headers} {len(blocks)}: they do not belong together, download both again")
    for number, (line, block) in enumerate(zip(lines, blocks, strict=True), start=1):
        try:
            data = json.loads(line)
            if split_of_table(data["table_id"]) != split:
                continue
            sql = data["sql"]
            row = _row(f"{split}-{number}", data["question"], _header(block, data["question"]), sql["sel"], sql["agg"], sql["conds"], LAST_ROW)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            yield Reject(str(questions), number, f"not a WikiSQL question with its header: {error!r}")
        else:
            yield row


def _header(block: str, question: str) -> list[tuple[str, str]]:
    """`table <c> Name <t> type <c> ... <i> question <s> SQL </s>` -> columns. The file wrote spaces in names as hyphens; those between digits are left."""
    head, _, asked = block.partition(" <i> ")
    if asked.partition(" <s> ")[0].strip() != question.strip():
        raise ValueError("the header belongs to another question")
    return [(re.sub(r"(?<!\d)-+|-+(?!\d)", " ", name).strip(), kind) for name, kind in re.findall(r"<c> (.*?) <t> (\S+)", head, flags=re.S)]


def _hub_rows(split: str) -> Iterator[Row | Reject]:
    for number, data in enumerate(load_hub_rows(HUB, split), start=1):
        try:
            table, sql, conds = data["table"], data["sql"], data["sql"]["conds"]
            header = list(zip(table["header"], table["types"], strict=True))
            conditions = list(zip(conds["column_index"], conds["operator_index"], conds["condition"], strict=True))
            row = _row(f"{split}-{number}", data["question"], header, sql["sel"], sql["agg"], conditions, len(table["rows"]) + 1)
        except (ValueError, IndexError) as error:
            yield Reject(HUB, number, f"not a WikiSQL question with its table: {error!r}")
        else:
            yield row


def _row(name: str, question: str, header: Header, select: int, aggregate: int, conditions: Conditions, end: int) -> Row:
    sheet = serialise_table([f"{title} (number)" if kind == "real" else title for title, kind in header], (), end)
    return Row(name, f"{question.strip()}\n{sheet}", sql_to_formula(header, select, aggregate, conditions, end), GROUPS[min(len(conditions), 2)])
