"""NL2Bash: parallel files -> rows; the published data set when it is at hand, which it must be."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pi_ray.config import ModelConfig, TaskConfig
from pi_ray.config.run_file import load_run_file
from pi_ray.errors import DataError
from pi_ray.models import load_tokenizer
from pi_ray.protocols import Reject, Row
from pi_ray.tasks.nl2bash import Nl2BashTask

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.nl").write_text(f"list files {split}\ncount lines\nshow the day\n")
        (tmp_path / f"{split}.cm").write_text("ls\nwc -l\ndate +%d\n")
    return tmp_path


DATA = Path(os.environ.get("PI_RAY_DATA") or ROOT.parent / "shared" / "data")
FIND = """# find

> Find files.
> More information: <https://example.org>.

- Find by name:

`find {{path/to/dir}} -name '{{*.{a,b}}}' {{[-p|--print]}}`

- Find empty ones:

`find -type {{f|d}} -empty`
"""


@pytest.fixture
def pages(tmp_path):
    (tmp_path / "pages").mkdir()
    for name, text in {
        "find": FIND,
        "wc": "# wc\n\n> Count.\n",
        "ls": "# ls\n\n> List.\n",
        "yes": "not a tldr page",
    }.items():
        (tmp_path / "pages" / f"{name}.md").write_text(text)
    return tmp_path / "pages"


@pytest.fixture
def published():
    found = DATA / "nl2bash"
    if not (found / "train.nl").is_file():
        pytest.fail(
            f"{found}: no NL2Bash here; set PI_RAY_DATA to the folder that holds nl2bash/train.nl, train.cm, dev.* and "
            "test.*"
        )
    return found


@pytest.fixture
def published_pages():
    found = DATA / "docs" / "tldr" / "pages"
    if not (found / "find.md").is_file():
        pytest.fail(
            f"{found}: no tldr pages here; set PI_RAY_DATA to the folder that holds docs/tldr/pages/find.md and more"
        )
    return found


def task_of(folder, **rows):
    return Nl2BashTask(TaskConfig(name="nl2bash", folder=str(folder), rows=rows))


def documented(folder, pages, **changes):
    return Nl2BashTask(TaskConfig(name="nl2bash", folder=str(folder), docs=str(pages), **changes))


def test_line_i_of_one_file_answers_line_i_of_the_other(folder):
    assert list(task_of(folder).rows("dev")) == [
        Row("dev-1", "list files dev", "ls"), Row("dev-2", "count lines", "wc -l"),
        Row("dev-3", "show the day", "date +%d"),
    ]


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


def test_a_missing_folder_says_which_files_and_where_to_get_them(tmp_path):
    with pytest.raises(DataError, match=r"(?s)train\.nl.*TellinaTool/nl2bash"):
        list(task_of(tmp_path / "nowhere").rows("train"))


def test_without_a_folder_rows_come_from_the_hub_and_no_script_is_run(monkeypatch):
    asked = []

    def load_dataset(name, **arguments):
        asked.append((name, arguments))
        return [{"nl": "list files", "bash": "ls"}, {"nl": " ", "bash": "ls"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    row, bad = task_of("").rows("dev")
    assert row == Row("dev-1", "list files", "ls") and isinstance(bad, Reject)
    assert asked == [("jiacheng-ye/nl2bash", {"split": "validation", "revision": "refs/convert/parquet"})]


def test_without_a_folder_a_missing_package_or_network_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets, or set task\.folder"):
        list(task_of("").rows("train"))

    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"no route.*or set task\.folder"):
        list(task_of("").rows("train"))


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


def test_documents_are_the_pages_of_the_most_used_utilities(folder, pages):
    (folder / "train.cm").write_text("find . | wc -l\nfind /\ndate\n")
    template = documented(folder, pages).template()
    assert template.instruction == task_of("").template().instruction
    assert template.documents == (
        "## find\nFind files.\n- Find by name: `find path/to/dir -name '*.{a,b}' -p`\n- Find empty ones: `find -type f "
        "-empty`",
        "## wc\nCount.",
    )


def test_documents_are_as_many_and_as_long_as_asked_and_ties_go_by_name(folder, pages):
    (folder / "train.cm").write_text("wc\nls\nfind\n")
    short = documented(folder, pages, docs_count=2, docs_examples=0, rows={"train": 1}).template()
    assert short.documents == ("## find\nFind files.", "## ls\nList.")


def test_the_fingerprint_follows_what_the_pages_say(folder, pages):
    base = documented(folder, pages).fingerprint()
    assert documented(folder, pages).fingerprint() == base != task_of(folder).fingerprint()
    (pages / "ls.md").write_text("# ls\n\n> List a folder.\n")
    assert documented(folder, pages).fingerprint() != base


def test_documents_that_cannot_be_used_are_refused_with_the_cure(folder, pages):
    with pytest.raises(DataError, match=r"folder of tldr pages.*tldr-pages/tldr"):
        documented(folder, pages / "nowhere").template()
    (folder / "train.cm").write_text("yes\nyes\nyes\n")
    with pytest.raises(DataError, match=r"yes\.md: not a tldr page"):
        documented(folder, pages).template()


def test_a_relative_docs_path_starts_from_the_run_file(tmp_path):
    (tmp_path / "run.yaml").write_text("name: a\ntask: {name: nl2bash, folder: data, docs: pages}\n")
    assert load_run_file(tmp_path / "run.yaml").task.docs == str(tmp_path / "pages")


def test_the_published_pages_give_a_template_of_the_commonest_utilities(published, published_pages):
    ten = documented(published, published_pages, docs_count=10, docs_examples=3).template()
    assert [d.split()[1] for d in ten.documents] == [
        "find", "xargs", "grep", "sort", "cut", "echo", "wc", "head", "cat", "tr",
    ]
    assert "- Find files by extension: `find path/to/directory -name '*.ext'`" in ten.documents[0]
    assert "{{" not in ten.text and "`arguments_source | xargs -n 1 command`" in ten.documents[1]
    tokenizer = load_tokenizer(ModelConfig())
    assert [
        len(tokenizer(t.text, add_special_tokens=False).input_ids)
        for t in (documented(published, published_pages).template(), ten)
    ] == [445, 946]


def test_the_published_split_has_the_papers_numbers_of_rows_and_no_rejects(published):
    rows = {split: list(task_of(published).rows(split)) for split in ("train", "dev", "test")}
    assert {split: len(r) for split, r in rows.items()} == {"train": 8090, "dev": 609, "test": 606}
    assert all(isinstance(row, Row) for r in rows.values() for row in r)
    trained = {row.query for row in rows["train"]}
    assert [sum(row.query in trained for row in rows[split]) for split in ("dev", "test")] == [10, 21], (
        "the overlap that the run file drops"
    )


def test_the_run_file_loads_and_drops_the_overlap(published):
    config = load_run_file(ROOT / "jobs" / "runs" / "nl2bash.yaml", [f"task.folder={published}"])
    assert (
        config.task.overlap == "drop"
        and len(list(Nl2BashTask(config.task).rows("train"))) == config.task.rows.train == 512
    )
