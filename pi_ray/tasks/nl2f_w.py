"""NL2F-W: spreadsheet formulas made from WikiSQL (Zhong et al., 2017), a substitute that may never be reported as NL2F.

A question, its table's header, in which "(number)" marks numeric columns, and its SQL become a row:
    SELECT MAX(c0) WHERE c2 = 'v' AND c3 > 5 -> MAX(FILTER(A2:A100,(C2:C100="v")*(D2:D100>5)))

`task.folder` has dev.jsonl (questions, SQL) and validation.headers.txt (columns and types, in the same order), which
exist for WikiSQL's dev part only. Its 8,421 questions are split anew, about 75/10/15 as NL2F is (paper A.1), by the
hash of their Wikipedia page, so that no table stands on two sides; tables are taken to end at LAST_ROW. Without
`task.folder`: Salesforce/wikisql on the hub, with its own splits and real ends. Scores from the two do not compare.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pi_ray.errors import DataError
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.nl2f import Nl2fTask, column_letters, serialise_table

HUB = "Salesforce/wikisql"
LAST_ROW = 100
AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVERAGE")  # by WikiSQL's numbers, and so are COMPARISONS
COMPARISONS = ("=", ">", "<")
GROUPS = ("no condition", "one condition", "several conditions")

Header = Sequence[tuple[str, str]]  # name and type, "text" or "real", of each column
Conditions = Sequence[tuple[int, int, Any]]  # column, comparison, value


class Nl2fWTask(Nl2fTask):
    """Template, documents and metric are those of nl2f; groups are the numbers of conditions."""

    data_files = ("dev.jsonl", "validation.headers.txt")
    must_hold = (
        "WikiSQL's dev.jsonl (salesforce/WikiSQL on GitHub) and validation.headers.txt (cycycc/nl2sql on GitHub, "
        "data/wikisql/bigquery/validation.txt). Without task.folder the data comes from the hub"
    )

    def read_split(self, split: str) -> Iterator[Row | Reject]:
        yield from self._read_folder(split) if self.config.folder else self._read_hub(split)

    def _read_folder(self, split: str) -> Iterator[Row | Reject]:
        self.require_files()
        questions, headers = (self.folder / name for name in self.data_files)
        lines = [x for x in questions.read_text(encoding="utf-8").split("\n") if x.strip()]
        blocks = [x for x in headers.read_text(encoding="utf-8").split("\n--SEPARATOR--\n") if x.strip()]
        if len(lines) != len(blocks):
            found = f"{questions} has {len(lines)} questions and {headers} {len(blocks)}"
            raise DataError(f"{found}: they do not belong together, download both again")
        for number, (line, block) in enumerate(zip(lines, blocks, strict=True), start=1):
            try:
                data = json.loads(line)
                if split_of_table(data["table_id"]) == split:
                    header, sql = _parse_header(block, data["question"]), data["sql"]
                    yield _row(f"{split}-{number}", data["question"], header, sql, sql["conds"], LAST_ROW)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                yield Reject(str(questions), number, f"not a WikiSQL question with its header: {error!r}")

    def _read_hub(self, split: str) -> Iterator[Row | Reject]:
        for number, data in enumerate(self.load_hub_rows(HUB, split), start=1):
            try:
                table, sql, conds = data["table"], data["sql"], data["sql"]["conds"]
                header = list(zip(table["header"], table["types"], strict=True))
                columns = conds["column_index"], conds["operator_index"], conds["condition"]
                conditions = list(zip(*columns, strict=True))
                yield _row(f"{split}-{number}", data["question"], header, sql, conditions, len(table["rows"]) + 1)
            except (ValueError, IndexError) as error:
                yield Reject(HUB, number, f"not a WikiSQL question with its table: {error!r}")


def sql_to_formula(header: Header, select: int, aggregate: int, conditions: Conditions, end: int) -> str:
    """SQL of WikiSQL -> a formula over rows 2 to `end`. Raises IndexError for an unknown column or operator."""
    cells = _cell_range(header, select, end)
    tests = [
        f"({_cell_range(header, c, end)}{COMPARISONS[comparison]}{_literal(value, header[c][1])})"
        for c, comparison, value in conditions
    ]
    if tests:
        cells = f"FILTER({cells},{'*'.join(tests)})"
    name = AGGREGATES[aggregate]
    if name == "COUNT" and header[select][1] != "real":
        name = "COUNTA"  # a spreadsheet's COUNT sees numbers only
    return f"{name}({cells})" if name else cells


def split_of_table(table: str) -> str:
    """The split of a table such as 1-10015132-11, by the number of its page in the middle."""
    page = re.sub(r"^\d-|-\d+$", "", table)
    share = int(hashlib.sha256(page.encode()).hexdigest(), 16) % 100
    return "train" if share < 75 else "dev" if share < 85 else "test"


def _cell_range(header: Header, index: int, end: int) -> str:
    if not 0 <= index < len(header):
        raise IndexError(f"the SQL names column {index} of a table with {len(header)}")
    return f"{column_letters(index)}2:{column_letters(index)}{end}"


def _literal(value: Any, kind: str) -> str:
    """Text in quotes, doubled inside. In a numeric column a bare number, also when it is written 24,637 or 56,6."""
    text = str(value)
    grouped = re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text)
    number = text.replace(",", "" if grouped else ".").removesuffix(".0")
    if kind == "real" and re.fullmatch(r"-?\d*\.?\d+(e[+-]?\d+)?", number):
        return number
    return '"' + text.replace('"', '""') + '"'


def _parse_header(block: str, question: str) -> list[tuple[str, str]]:
    """`table <c> Name <t> type <c> ... <i> question <s> SQL </s>` -> columns; hyphens not between digits are spaces."""
    head, _, rest = block.partition(" <i> ")
    if rest.partition(" <s> ")[0].strip() != question.strip():
        raise ValueError("the header belongs to another question")
    columns = re.findall(r"<c> (.*?) <t> (\S+)", head, flags=re.S)
    return [(re.sub(r"(?<!\d)-+|-+(?!\d)", " ", name).strip(), kind) for name, kind in columns]


def _row(name: str, question: str, header: Header, sql: dict[str, Any], conditions: Conditions, end: int) -> Row:
    sheet = serialise_table([f"{title} (number)" if kind == "real" else title for title, kind in header], (), end)
    answer = sql_to_formula(header, sql["sel"], sql["agg"], conditions, end)
    return Row(name, f"{question.strip()}\n{sheet}", answer, GROUPS[min(len(conditions), 2)])
