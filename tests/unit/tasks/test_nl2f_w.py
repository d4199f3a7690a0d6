"""NL2F-W: WikiSQL's SQL -> spreadsheet formulas, split by Wikipedia page; the published questions must be at hand."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pi_ray.config import TaskConfig
from pi_ray.config.run_file import load_run_file
from pi_ray.errors import DataError
from pi_ray.protocols import SPLITS, Reject, Row
from pi_ray.tasks.nl2f_w import Nl2fWTask, split_of_table, sql_to_formula

ROOT = Path(__file__).parents[3]
HEADER = [("Name", "text"), ("Points", "real"), ("Town", "text")]


@pytest.fixture(scope="module")
def published():
    found = Path(os.environ.get("PI_RAY_DATA") or ROOT.parent / "shared" / "data") / "wikisql"
    if not (found / "validation.headers.txt").is_file():
        pytest.fail(
            f"{found}: no WikiSQL here; set PI_RAY_DATA to the folder that holds wikisql/dev.jsonl and "
            "wikisql/validation.headers.txt"
        )
    return found


@pytest.fixture(scope="module")
def rows(published):
    return {split: list(task_of(published).rows(split)) for split in SPLITS}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, [question("Who has 5?"), question("How many towns?", agg=3, sel=2, conds=[])])
    return tmp_path


def question(text, sel=0, agg=0, conds=((1, 0, 5),), table="1-1-1"):
    return {"table_id": table, "question": text, "sql": {"sel": sel, "agg": agg, "conds": list(conds)}}


def write(folder, questions):
    columns = "<c> Full-name <t> text <c> Points <t> real <c> In-2007-08 <t> text"
    (folder / "dev.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "validation.headers.txt").write_text(
        "\n--SEPARATOR--\n".join(f"t_1 {columns} <i> {q['question']} <s> SELECT x </s>" for q in questions)
    )


def task_of(folder, **changes):
    return Nl2fWTask(TaskConfig(name="nl2f-w", folder=str(folder), **changes))


@pytest.mark.parametrize(
    ("select", "aggregate", "conditions", "expected"),
    [
        (0, 0, [], "A2:A9"),
        (1, 5, [], "AVERAGE(B2:B9)"),
        (0, 0, [(2, 0, "New York")], 'FILTER(A2:A9,(C2:C9="New York"))'),
        (1, 1, [(2, 0, "Rome"), (1, 1, 5)], 'MAX(FILTER(B2:B9,(C2:C9="Rome")*(B2:B9>5)))'),
        (1, 3, [(1, 2, 2.5)], "COUNT(FILTER(B2:B9,(B2:B9<2.5)))"),
        (0, 3, [(1, 0, 12.0)], "COUNTA(FILTER(A2:A9,(B2:B9=12)))"),
        (0, 0, [(2, 0, "3")], 'FILTER(A2:A9,(C2:C9="3"))'),
        (0, 0, [(0, 0, '"Rio" live')], 'FILTER(A2:A9,(A2:A9="""Rio"" live"))'),
        (0, 0, [(1, 1, "24,637")], "FILTER(A2:A9,(B2:B9>24637))"),
        (0, 0, [(1, 1, "56,6")], "FILTER(A2:A9,(B2:B9>56.6))"),
        (0, 0, [(1, 0, "n/a")], 'FILTER(A2:A9,(B2:B9="n/a"))'),
    ],
)
def test_sql_becomes_a_formula(select, aggregate, conditions, expected):
    assert sql_to_formula(HEADER, select, aggregate, conditions, 9) == expected


def test_a_row_has_the_question_the_header_and_the_number_of_conditions(folder):
    split = split_of_table("1-1-1")
    first, second = task_of(folder).rows(split)
    sheet = "[TABLE]\nA: Full name | B: Points (number) | C: In 2007-08\n(data to row 100)\n[/TABLE]"
    assert first == Row(f"{split}-1", f"Who has 5?\n{sheet}", "FILTER(A2:A100,(B2:B100=5))", "one condition")
    assert second == Row(f"{split}-2", f"How many towns?\n{sheet}", "COUNTA(C2:C100)", "no condition")


def test_all_tables_of_a_page_stand_in_one_split():
    assert split_of_table("1-10015132-11") == split_of_table("1-10015132-9") == split_of_table("2-10015132-1")
    shares = [sum(split_of_table(f"1-{page}-1") == split for page in range(4000)) / 4000 for split in SPLITS]
    assert shares == pytest.approx([0.75, 0.10, 0.15], abs=0.02)


@pytest.mark.parametrize(
    "line",
    [
        "text", "[1]", '{"table_id": "1-1-1"}', json.dumps(question("Another?")),
        json.dumps(question("Who has 5?", sel=3)),
    ],
)
def test_a_question_that_cannot_be_used_is_rejected_and_the_rest_kept(folder, line):
    good = (folder / "dev.jsonl").read_text().splitlines()[1]
    (folder / "dev.jsonl").write_text(f"{line}\n{good}\n")
    bad, row = task_of(folder).rows(split_of_table("1-1-1"))
    assert isinstance(bad, Reject) and bad.line == 1 and isinstance(row, Row)


def test_files_that_do_not_run_in_parallel_are_refused(folder):
    (folder / "dev.jsonl").write_text(json.dumps(question("Who has 5?")))
    with pytest.raises(DataError, match="do not belong together"):
        list(task_of(folder).rows("train"))


def test_a_missing_folder_says_which_files_and_where_to_get_them(tmp_path):
    with pytest.raises(DataError, match=r"validation\.headers\.txt.*cycycc/nl2sql"):
        list(task_of(tmp_path / "nowhere").rows("train"))


def test_without_a_folder_rows_come_from_the_hub_with_the_real_ends_of_tables(monkeypatch):
    sql = {"sel": 0, "agg": 0, "conds": {"column_index": [1], "operator_index": [0], "condition": ["5"]}}
    data = {
        "question": "Who has 5?",
        "table": {"header": ["Name", "Points"], "types": ["text", "real"], "rows": [["a", "5"], ["b", "6"]]},
        "sql": sql,
    }
    monkeypatch.setitem(
        sys.modules, "datasets",
        SimpleNamespace(load_dataset=lambda name, **_: [data, {**data, "sql": {**sql, "sel": 7}}]),
    )
    row, bad = task_of("").rows("test")
    assert row == Row(
        "test-1", "Who has 5?\n[TABLE]\nA: Name | B: Points (number)\n(data to row 3)\n[/TABLE]",
        "FILTER(A2:A3,(B2:B3=5))", "one condition",
    )
    assert isinstance(bad, Reject)


def test_without_a_folder_a_missing_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets, or set task\.folder"):
        list(task_of("").rows("train"))


def test_the_fingerprint_follows_contents_and_limits(folder):
    base = task_of(folder).fingerprint()
    assert task_of(folder).fingerprint() == base != task_of(folder, rows={"train": 2}).fingerprint()
    write(folder, [question("Who has 6?")])
    assert task_of(folder).fingerprint() != base


def test_the_published_questions_are_all_used(rows):
    assert {split: len(rows[split]) for split in SPLITS} == {"train": 6444, "dev": 780, "test": 1197}
    assert all(isinstance(row, Row) for split in SPLITS for row in rows[split])


def test_no_query_and_no_page_of_the_published_questions_crosses_splits(published, rows):
    questions = [json.loads(line) for line in (published / "dev.jsonl").read_text(encoding="utf-8").split("\n") if line]
    pages = {
        split: {questions[int(row.id.rpartition("-")[2]) - 1]["table_id"].split("-")[1] for row in rows[split]}
        for split in SPLITS
    }
    queries = {split: {row.query for row in rows[split]} for split in SPLITS}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not pages[one] & pages[other] and not queries[one] & queries[other]


@pytest.mark.parametrize(
    ("number", "asked", "expected"),
    [
        (
            "train-1", "What position does the player who played for butler cc (ks) play?",
            'FILTER(D2:D100,(F2:F100="Butler CC (KS)"))',
        ),
        ("train-2", "How many schools did player number 3 play at?", 'COUNTA(FILTER(F2:F100,(B2:B100="3")))'),
        ("test-22", "Name the minimum tiesplayed for 6 years", "MIN(FILTER(F2:F100,(E2:E100=6)))"),
        ("test-8410", "Name the least runners with dist of 10.5", "MIN(FILTER(G2:G100,(B2:B100=10.5)))"),
    ],
)
def test_known_questions_have_the_formulas_worked_out_by_hand(rows, number, asked, expected):
    row = next(row for row in rows[number.partition("-")[0]] if row.id == number)
    assert row.query.startswith(f"{asked}\n[TABLE]\nA: ") and row.answer == expected


def test_the_run_file_loads(published):
    config = load_run_file(ROOT / "jobs" / "runs" / "nl2f-w.yaml", [f"task.folder={published}"])
    assert len(list(Nl2fWTask(config.task).rows("train"))) == config.task.rows.train == 512
