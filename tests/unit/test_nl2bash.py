"""NL2Bash: parallel files -> rows; the published data set when it is at hand, which it must be."""

import os
from pathlib import Path

import pytest

from pi_ray.config import ModelConfig, TaskConfig
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.protocols import Reject, Row
from pi_ray.runfile import load
from pi_ray.tasks.nl2bash import Nl2BashTask

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.nl").write_text(f"list files {split}\ncount lines\nshow the day\n")
        (tmp_path / f"{split}.cm").write_text("ls\nwc -l\ndate +%d\n")
    return tmp_path


@pytest.fixture
def published():
    found = Path(os.environ.get("PI_RAY_DATA") or ROOT.parent / "shared" / "data") / "nl2bash"
    if not (found / "train.nl").is_file():
        pytest.fail(f"{found}: no NL2Bash here; set PI_RAY_DATA to the folder that holds nl2bash/train.nl, train.cm, dev.* and test.*")
    return found


def task_of(folder, **rows):
    return Nl2BashTask(TaskConfig(name="nl2bash", folder=str(folder), rows=rows))


def test_line_i_of_one_file_answers_line_i_of_the_other(folder):
    assert list(task_of(folder).rows("dev")) == [Row("dev-1", "list files dev", "ls"), Row("dev-2", "count lines", "wc -l"), Row("dev-3", "show the day", "date +%d")]


def test_an_empty_or_undecodable_line_is_rejected_and_the_rest_kept(folder):
    (folder / "train.nl").write_bytes(b"one\n\xff\n\n")
    rows = list(task_of(folder).rows("train"))
    assert [type(r) for r in rows] == [Row, Reject, Reject] and [r.line for r in rows[1:]] == [2, 3]


def test_files_that_do_not_run_in_parallel_are_refused(folder):
    (folder / "train.cm").write_text("ls\n")
    with pytest.raises(DataError, match="different numbers of lines"):
        list(task_of(folder).rows("train"))


def test_only_a_line_feed_ends_a_line(folder):
    (folder / "train.nl").write_bytes("a\x0bb\u2028c\n2\n3\n".encode())
    assert next(task_of(folder).rows("train")).query == "a\x0bb\u2028c"


@pytest.mark.parametrize("where", ["", "nowhere"])
def test_a_missing_folder_says_which_files_and_where_to_get_them(tmp_path, where):
    with pytest.raises(DataError, match=r"(?s)train\.nl.*TellinaTool/nl2bash"):
        list(task_of(tmp_path / where if where else "").rows("train"))


def test_the_fingerprint_follows_contents_and_limits(folder):
    base = task_of(folder).fingerprint()
    assert task_of(folder).fingerprint() == base != task_of(folder, train=2).fingerprint()
    (folder / "dev.cm").write_text("ls -a\nwc -l\ndate\n")
    assert task_of(folder).fingerprint() != base


def test_the_template_follows_the_paper_and_has_its_documents():
    template = task_of("").template()
    assert template.instruction.startswith("You are an advanced shell programmer")
    assert [d.split()[1] for d in template.documents][:5] == ["find", "grep", "xargs", "sed", "awk"]
    tokenizer = load_tokenizer(ModelConfig())
    assert 250 <= len(tokenizer(template.text, add_special_tokens=False).input_ids) <= 380


def test_the_published_split_has_the_papers_numbers_of_rows_and_no_rejects(published):
    rows = {split: list(task_of(published).rows(split)) for split in ("train", "dev", "test")}
    assert {split: len(r) for split, r in rows.items()} == {"train": 8090, "dev": 609, "test": 606}
    assert all(isinstance(row, Row) for r in rows.values() for row in r)
    trained = {row.query for row in rows["train"]}
    assert [sum(row.query in trained for row in rows[split]) for split in ("dev", "test")] == [10, 21], "the overlap that the run file drops"


def test_the_run_file_loads_and_drops_the_overlap(published):
    config = load(ROOT / "jobs" / "runs" / "nl2bash.yaml", [f"task.folder={published}"])
    assert config.task.overlap == "drop" and len(list(Nl2BashTask(config.task).rows("train"))) == config.task.rows.train == 512
