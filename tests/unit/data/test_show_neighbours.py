"""`pi-ray neighbours`: people read the examples of a row, with their scores."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi_ray import cli
from pi_ray.data.find_neighbours import SCHEMA
from pi_ray.protocols import Row
from pi_ray.report.page import write_report
from pi_ray.run.artifact import staged
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import write_rows
from tests.unit import fake_run

FACTS = {
    "fingerprint": "f", "rows": 4, "shots": 2, "score": "bleu", "by": "answer", "train_score": 41.25, "method": "exact",
}


@pytest.fixture
def run(tmp_path):
    """A prepared run of two training rows and one of dev and test each."""
    (tmp_path / "run.yaml").write_text(f"name: tiny\nrun_dir: {tmp_path / 'run'}\n")
    found = RunDir(tmp_path / "run")
    rows = {
        "train": [Row("a", "list [red]files[/]", "ls -a\nls -b"), Row("b", "count lines", "wc -l")],
        "dev": [Row("d", "list all", "ls")], "test": [Row("t", "count all", "wc")],
    }
    with staged(found.rows, fingerprint="f", rows={s: len(r) for s, r in rows.items()}) as made:
        for split, some in rows.items():
            write_rows(made / f"{split}.parquet", some)
    near = {
        "id": ["a", "b", "d", "t"], "split": ["train", "train", "dev", "test"],
        "neighbours": [["b"], ["a"], ["a", "b"], []], "scores": [[12.5], [12.5], [80.04, 3.0], []],
    }
    pq.write_table(pa.table(near, schema=SCHEMA), found.neighbours)
    found.neighbours.with_suffix(".json").write_text(json.dumps(FACTS))
    return tmp_path


def shown(run, capsys, *arguments):
    code = cli.main(["neighbours", str(run / "run.yaml"), *arguments])
    return code, capsys.readouterr()


def test_a_row_is_printed_with_its_examples_best_first(run, capsys):
    code, said = shown(run, capsys, "--row", "d")
    assert code == 0 and said.out == (
        "d  dev; its examples are chosen by the query\nquery  list all\nanswer ls\n\n1. BLEU 80.0  a\n   query  list "
        "[red]files[/]\n   answer ls -a\n          ls -b\n\n"
        "2. BLEU 3.0  b\n   query  count lines\n   answer wc -l\n\n"
        "All rows: 2 for each of 4 rows, mean BLEU 41.2 between train answers; every pair was scored. In a prompt the "
        "best stands last, next to the query.\n"
    )


def test_a_training_row_is_chosen_by_its_answer_and_a_split_can_be_named(run, capsys):
    assert shown(run, capsys, "--row", "a", "--split", "train")[1].out.startswith(
        "a  train; its examples are chosen by the answer\n"
    )
    assert "The bank has no example for it." in shown(run, capsys, "--row", "t")[1].out


def test_what_they_were_chosen_by_stands_in_the_file_whatever_the_config_says_now(run, capsys):
    said = shown(run, capsys, "--row", "a", "retrieve.by=query")[1].out
    assert (
        said.startswith("a  train; its examples are chosen by the answer\n")
        and "mean BLEU 41.2 between train answers" in said
    )


def test_examples_of_other_rows_are_not_shown(run, capsys):
    found = RunDir(run / "run")
    with staged(found.rows, fingerprint="g", rows={"train": 1}) as made:
        write_rows(made / "train.parquet", [Row("a", "list files", "ls")])
    code, said = shown(run, capsys, "--row", "a")
    assert code and "the rows were written anew since; run 'pi-ray prepare' with this run.yaml" in said.err


def test_a_row_that_is_not_there_is_said_with_the_closest(run, capsys):
    code, said = shown(run, capsys, "--row", "dd")
    assert code and "no row 'dd' in this run; did you mean d?" in said.err
    assert "no row 'd' in train" in shown(run, capsys, "--row", "d", "--split", "train")[1].err


def test_without_neighbours_the_cure_is_said(run, capsys):
    (run / "run" / "neighbours.parquet").unlink()
    code, said = shown(run, capsys, "--row", "d")
    assert code and "run 'pi-ray prepare' with this run.yaml" in said.err


def test_faiss_says_what_it_missed(run, capsys):
    seen = {"rows": 256, "recall": 0.963, "score": 54.321, "exact_score": 55.0}
    RunDir(run / "run").neighbours.with_suffix(".json").write_text(
        json.dumps({**FACTS, "method": "faiss", "audit": seen})
    )
    assert (
        "of 256 rows whose every pair was scored it gave 96.3% of the best, mean BLEU 54.32 where 55.00 was there"
        in shown(run, capsys, "--row", "d")[1].out
    )


def test_the_report_tells_how_the_examples_were_found(tmp_path):
    evaluated = fake_run.write_run(tmp_path)
    assert (
        "Examples: " not in write_report(evaluated, fake_run.config(tmp_path)).read_text().partition("<h2>Samples")[0]
    )
    evaluated.neighbours.with_suffix(".json").write_text(
        json.dumps(
            {**FACTS, "method": "faiss", "audit": {"rows": 256, "recall": 0.963, "score": 54.321, "exact_score": 55.0}}
        )
    )
    page = write_report(evaluated, fake_run.config(tmp_path)).read_text()
    assert (
        "Examples: 2 for each of 4 rows, mean BLEU 41.2 between train answers; FAISS proposed: of 256 rows whose every "
        "pair was scored it gave 96.3% of the best"
        in page
    )
