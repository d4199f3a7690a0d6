"""NL2F: the authors' tables with questions -> rows, and documents from lists of functions."""

import json
import os
from pathlib import Path

import pytest

from pi_ray.config import ModelConfig, TaskConfig
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.nl2f import MAX_CELL, MAX_ROWS, Nl2fTask, called_functions, column_letters, serialise_table

DATA = Path(os.environ.get("PI_RAY_DATA") or Path(__file__).parents[4] / "shared" / "data")
SHEET = [["", "A", "B"], ["1", "Name", "Points"], ["2", "Ann", "5"], ["3", "Bo  b", "7"]]
ASKED = {"Question": "Who has 5 points?", "Formula": "x", "Formula2": 'FILTER(A2:A3,(B2:B3=5))', "Level": "easy"}


@pytest.fixture
def folder(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"TableName": "t", "Table": SHEET, "t5Formulas": [ASKED, {**ASKED, "Level": "hard"}]}])
        )
    return tmp_path


def task_of(folder, **changes):
    return Nl2fTask(TaskConfig(name="nl2f", folder=str(folder), **changes))


def test_each_question_of_a_table_is_a_row_with_the_sheet_in_its_query(folder):
    rows = list(task_of(folder).rows("dev"))
    assert [(row.id, row.group) for row in rows] == [("dev-1-1", "easy"), ("dev-1-2", "hard")]
    assert rows[0].query == "Who has 5 points?\n[TABLE]\nA: Name | B: Points\n2: Ann | 5\n3: Bo b | 7\n[/TABLE]"
    assert rows[0].answer == "FILTER(A2:A3,(B2:B3=5))"


def test_columns_beyond_z_have_two_letters():
    assert [column_letters(i) for i in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]


def test_a_giant_table_is_cut_and_says_where_its_data_end():
    lines = serialise_table(["Name"], [["x" * 99]] * 500, 501).splitlines()
    assert len(lines) == MAX_ROWS + 4 and lines[-2] == "(data to row 501)"
    assert lines[2] == "2: " + "x" * (MAX_CELL - 1) + "…"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"Table": SHEET[:1], "t5Formulas": [ASKED]}, "at least two rows"),
        ({"Table": SHEET[1:], "t5Formulas": [ASKED]}, "column letters"),
        ({"Table": SHEET}, "'t5Formulas' must be a list"),
        ("text", "'Table' must be a list"),
        ({"Table": SHEET, "t5Formulas": [{**ASKED, "Formula2": ""}]}, "entry 1: Question and Formula2"),
        ({"Table": SHEET, "t5Formulas": ["text"]}, "entry 1: Question and Formula2"),
    ],
)
def test_a_malformed_table_or_entry_is_rejected_and_the_rest_kept(folder, table, reason):
    good = {"Table": SHEET, "t5Formulas": [ASKED]}
    (folder / "train.json").write_text(json.dumps([good, table, good]))
    first, bad, last = task_of(folder).rows("train")
    assert isinstance(first, Row) and isinstance(last, Row) and isinstance(bad, Reject)
    assert bad.line == 2 and reason in bad.reason


@pytest.mark.parametrize("text", ["", "{}", '[{"Table": 1}', "\xff", "[1 2]", "[1,,2]", "[1,]", "[1] 2", "[1", "[] []"])
def test_a_file_that_is_no_array_is_refused(folder, text):
    (folder / "train.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"not a JSON array in UTF-8 .*download the tables again"):
        list(task_of(folder).rows("train"))


@pytest.mark.parametrize("where", ["", "nowhere"])
def test_a_missing_folder_says_which_files_and_where_to_get_them(tmp_path, where):
    with pytest.raises(DataError, match=r"valid\.json.*timetub/NL2Formula"):
        list(task_of(tmp_path / where if where else "").rows("train"))


def test_exact_match_is_the_authors(folder):
    task, row = task_of(folder), Row("a", "q", 'FILTER(A2:A9,(B2:B9="New York"))')
    assert task.score(row, "filter(a2:a9, (b2:b9 = newyork))") == {"exact_match": 1.0}
    assert [task.score(row, output)["exact_match"] for output in (f"={row.answer}", "FILTER(A2:A9,(B2:B9))", "")] == [
        0.0, 0.0, 0.0,
    ]


def test_quoted_text_calls_no_function():
    assert called_functions('COUNT(FILTER(A2:A9,(B2:B9="Max(x)")*(C2:C9>1)))') == ["COUNT", "FILTER"]


def test_the_template_follows_the_paper_and_has_its_documents():
    template = task_of("").template()
    assert (
        template.instruction.startswith("You are an advanced data analyst and programmer")
        and "[TABLE]" in template.instruction
    )
    assert [d.split("(")[0].split(",")[0] for d in template.documents] == [
        "## FILTER",
        "## MAX",
        "## COUNT",
        "## UNIQUE",
        "## SORT",
        "## INDEX",
    ]
    assert 400 <= len(load_tokenizer(ModelConfig())(template.text, add_special_tokens=False).input_ids) <= 500


def test_documents_come_from_described_functions(folder):
    lines = [
        {"function": "FILTER", "description": "Keeps rows.", "params": ["{*} range What to keep."]},
        {"function": "ABS", "description": "Unused."},
    ]
    (folder / "functions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    template = task_of(folder, docs=str(folder / "functions.jsonl")).template()
    assert template.documents == ("## FILTER\nKeeps rows. range What to keep.",)


def test_documents_come_from_help_pages_of_one_or_more_functions(folder):
    pages = [
        {"title": "Overview", "text": "Overview\nABS\nGives the size.\n FILTER\n An overview of it.\nMAX\n 5"},
        {
            "title": "x",
            "text": (
                "FILTER function\nThis function is part of a standard.\nKeeps the rows asked for.\n "
                "Syntax\nFILTER(Range; Test)\n"
                + "Longer. " * 80
            ),
        },
    ]
    (folder / "help.jsonl").write_text("\n".join(map(json.dumps, pages)))
    (document,) = task_of(folder, docs=str(folder / "help.jsonl")).template().documents
    assert (
        document.startswith("## FILTER\nKeeps the rows asked for. FILTER(Range, Test) Longer.")
        and len(document.split()) <= 62
    )


def test_the_fingerprint_follows_contents_limits_and_documents(folder):
    docs = folder / "functions.jsonl"
    docs.write_text(json.dumps({"function": "FILTER", "description": "Keeps rows."}))
    prints = [
        task_of(folder).fingerprint(), task_of(folder, rows={"train": 1}).fingerprint(),
        task_of(folder, docs=str(docs)).fingerprint(),
    ]
    docs.write_text(json.dumps({"function": "FILTER", "description": "Keeps some rows."}))
    prints.append(task_of(folder, docs=str(docs)).fingerprint())
    (folder / "valid.json").write_text("[]")
    prints.append(task_of(folder).fingerprint())
    assert len(set(prints)) == 5


@pytest.mark.parametrize(
    "text", [None, "text", "[1]", '{"name": "FILTER"}', '{"function": "ABS", "description": "Unused."}']
)
def test_documents_that_cannot_be_used_are_refused_with_the_cure(folder, text):
    docs = folder / "docs.jsonl"
    if text is not None:
        docs.write_text(text)
    with pytest.raises(DataError, match=r"docs\.jsonl.*function"):
        task_of(folder, docs=str(docs)).template()


@pytest.mark.parametrize(
    ("file", "names"),
    [("formulajs/functions.jsonl", ["MAX"]), ("libreoffice/calc_functions_pages.jsonl", ["FILTER", "MAX", "SORTBY"])],
)
def test_the_published_lists_of_functions_are_read(folder, file, names):
    docs = DATA / "docs" / file
    if not docs.is_file():
        pytest.fail(f"{docs}: no list of functions here; set PI_RAY_DATA to the folder that holds docs/{file}")
    (folder / "train.json").write_text(
        json.dumps([{"Table": SHEET, "t5Formulas": [{**ASKED, "Formula2": "FILTER(SORTBY(MAX(A2:A9)))"}]}])
    )
    documents = task_of(folder, docs=str(docs)).template().documents
    assert [d.split()[1] for d in documents] == names and "maximum value" in documents[names.index("MAX")]
