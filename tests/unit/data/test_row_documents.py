"""Documents that come with a row: read, compressed, and put where a prompt has them."""

import json
import shutil

import pyarrow as pa
import pytest

from pi_ray.config import ModelConfig, PromptConfig, RunConfig, TaskConfig
from pi_ray.data import row_documents
from pi_ray.data.ingest import ingest
from pi_ray.data.pieces import MapRange, RangeSource, RowRange, write_files
from pi_ray.data.prepare import wanted_documents
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Example, PromptEncoder, render_prompt
from pi_ray.protocols import Reject, Row
from pi_ray.run.artifact import read_manifest
from pi_ray.run.directory import RunDir, documents_file
from pi_ray.run.phases import plain_finetuning_config
from pi_ray.tasks.jsonl import JsonlTask

LONG = (
    "The parcel shop opens at nine in the morning and closes late in the evening on every day of the week, "
    "as the sign on its door says to all who come by."
)


def task_of(folder, lines, **changes):
    for split in ("train", "dev", "test"):
        own = [{**line, "query": f"{split}: {line['query']}"} for line in lines]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    return TaskConfig(
        train=str(folder / "train.jsonl"), dev=str(folder / "dev.jsonl"), test=str(folder / "test.jsonl"),
        template="none", **changes,
    )


def test_a_row_brings_texts_or_titled_texts(tmp_path):
    lines = [
        {"query": "q", "answer": "a", "documents": ["one", {"title": "Two", "text": " two\n"}, {"text": "three"}]},
        {"query": "r", "answer": "a", "documents": []},
    ]
    rows = list(JsonlTask(task_of(tmp_path, lines)).rows("train"))
    assert [r.documents for r in rows] == [("one", "## Two\ntwo", "three"), ()]


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("text", "'documents' must be a list"), ([7], r"'documents[0]' must be text, found a number"),
        ([{"title": "t"}], "missing field 'text'"), (["", "x"], "'documents[0]' is empty"),
        ([{"text": "x", "title": 3}], "'documents[0].title' must be text"),
    ],
)
def test_documents_that_cannot_be_used_reject_their_row_alone(tmp_path, bad, reason):
    lines = [{"query": "q", "answer": "a", "documents": bad}, {"query": "r", "answer": "a"}]
    first, second = JsonlTask(task_of(tmp_path, lines)).rows("train")
    assert isinstance(first, Reject) and reason in first.reason and isinstance(second, Row)


def test_a_prompt_has_the_template_the_rows_documents_examples_and_the_query():
    config = PromptConfig(chat="chatml")
    encoder, shots = PromptEncoder(load_tokenizer(ModelConfig()), config), [Example("a?", "b")]
    text = render_prompt(config, "c?", "Template.", shots, ["Doc one.", "Doc two."])
    assert text == "Template.\n\nDoc one.\n\nDoc two.\n\nExamples:\n\na?\nb\n\nc?"
    ids = encoder.encode("c?", "Template.", shots, ["Doc one.", "Doc two."])
    assert (
        ids == encoder.prefix("Template.") + encoder.row("c?", shots, ["Doc one.", "Doc two."])
        and encoder.tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoder.row("c?") == encoder.row("c?", (), ()), (
        "the query alone, as it is served where no documents are left"
    )


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A run of 5 rows in each split; rows 1 and 3 have documents, one of which both share."""
    monkeypatch.setenv("PI_RAY_CACHE", str(tmp_path / "cache"))
    own = {1: [LONG, f"First of all: {LONG}"], 3: [LONG]}
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "run_dir": str(tmp_path / "run"),
            "compress": {"name": "none", "documents": {"name": "halves"}},
            "task": task_of(
                tmp_path, [{"query": f"q{i}", "answer": "a", "documents": own.get(i, [])} for i in range(5)]
            ).model_dump(),
        }
    )
    run = RunDir(config.root)
    ingest(JsonlTask(config.task), config.task, run, "f", lambda line: None)
    return config, run


class Halves:
    """A compressor that keeps the first words."""

    calls = 0

    def __init__(self, config):
        pass

    def compress(self, text, rate):
        Halves.calls += 1
        words = text.split()
        return " ".join(words[: round(len(words) * rate)])


def in_process(config, step, todo, make, *args, actors):
    """run_pipeline without Ray, by one actor."""
    mapped = MapRange(make, args, step.outputs, None)
    for task in RangeSource(step.run, todo, None).get_read_tasks(len(todo)):
        write_files(mapped(*task()), step.schema)


def test_documents_are_compressed_row_by_row_and_each_rate_finds_its_own(prepared, monkeypatch, tmp_path):
    config, run = prepared
    monkeypatch.setenv("PI_RAY_CACHE", "")  # the user's own cache folder has the tokenizer; results go to another
    monkeypatch.setattr("pi_ray.compress.cache._path", lambda key: tmp_path / "compressed" / key)
    parts = {"halves": f"{__name__}:Halves", "none": "pi_ray.compress.none:NoCompression"}
    monkeypatch.setattr("pi_ray.registry.compressors._parts", parts)
    monkeypatch.setattr(row_documents, "run_pipeline", in_process)
    monkeypatch.setattr(row_documents, "PIECE_ROWS", 2)
    Halves.calls, said, wanted = 0, [], [("train", 0.5), ("test", 0.5), ("train", 0.5)]
    assert not row_documents.has_documents(run, "f", wanted)
    row_documents.compress_documents(config, run, "f", wanted, said.append)
    assert row_documents.has_documents(run, "f", wanted) and not row_documents.has_documents(run, "g", wanted)
    assert not row_documents.has_documents(run, "f", [*wanted, ("dev", 0.5)])
    assert said[0].startswith("documents: rate 0.5 -> achieved 0.") and "of 6 documents of rows" in said[0]
    whole, half, none = (run.read_rows("train", rate) for rate in (1.0, 0.5, 0.0))
    counts = [0, 2, 0, 1, 0]
    assert [len(r.documents) for r in whole] == [len(r.documents) for r in half] == counts and not any(
        r.documents for r in none
    )
    assert whole[3].documents == (LONG,) and half[1].documents[0] == half[3].documents[0]
    assert len(half[3].documents[0]) < 0.7 * len(LONG)
    assert run.read_rows("train", 0.5, 3, 5) == half[3:5] and (run.documents / documents_file("test", 0.5)).exists()
    assert not (tmp_path / "compressed").exists(), "the cache has no file for each document of a row"


def compress_in_process(config, monkeypatch, compressor, rows):
    """The table of CompressDocuments at rate 0.5 for rows of documents."""
    monkeypatch.setenv("PI_RAY_CACHE", "")
    monkeypatch.setattr("pi_ray.compress.cache._path", lambda key: config.root / "compressed" / key)
    monkeypatch.setattr("pi_ray.registry.compressors._parts", {"halves": f"{__name__}:{compressor.__name__}"})
    table = pa.table({"id": [str(i) for i in range(len(rows))], "documents": rows})
    return row_documents.CompressDocuments(config, {"train": [0.5]})(table, RowRange("train", 0, len(rows), 0))[0.5]


def test_a_document_that_rows_share_is_compressed_once(prepared, monkeypatch):
    def calls(rows):
        Halves.calls = 0
        compress_in_process(prepared[0], monkeypatch, Halves, rows)
        return Halves.calls

    assert calls([[LONG], [LONG, LONG]]) == calls([[LONG]]) > 0


class Nothing:
    """A compressor that keeps no word."""

    def __init__(self, config):
        pass

    def compress(self, text, rate):
        return ""


def test_a_document_of_which_nothing_is_left_is_left_out(prepared, monkeypatch):
    table = compress_in_process(prepared[0], monkeypatch, Nothing, [[LONG, LONG], []])
    assert table["documents"].to_pylist() == [[], []] and table["count"].to_pylist() == [2, 0]


def test_an_actor_takes_the_cores_that_it_asked_for_and_no_share_of_the_node(prepared, monkeypatch):
    config, _ = prepared
    threads = []
    monkeypatch.setattr("pi_ray.registry.compressors._parts", {"halves": f"{__name__}:Halves"})
    monkeypatch.setattr(row_documents, "load_tokenizer", lambda model: None)
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setattr("os.cpu_count", lambda: 30)
    for asked in ({}, {"CPU": 0.5}, {"CPU": 4}):
        row_documents.CompressDocuments(config.replace(**{"cluster.prepare_resources": asked}), {})
    assert threads == [1, 1, 4]


def test_rows_without_documents_need_no_step(tmp_path):
    config = task_of(tmp_path, [{"query": "q", "answer": "a"}])
    run = RunDir(tmp_path / "run")
    ingest(JsonlTask(config), config, run, "f", lambda line: None)
    assert row_documents.has_documents(run, "f", [("train", 0.5)]) and run.read_rows("train", 0.5) == run.read_rows(
        "train"
    )


def test_the_documents_rate_follows_the_templates_or_its_own():
    own = RunConfig.model_validate({"name": "a", "compress": {"documents": {"rate": {0.5: 0.2}}}}).compress
    assert [row_documents.rate_of_documents(own, r) for r in (1.0, 0.5, 0.0)] == [1.0, 0.2, 0.0]
    assert row_documents.rate_of_documents(RunConfig(name="a").compress, 0.5) == 0.5


def test_a_half_made_step_goes_on_with_its_pieces(prepared, monkeypatch):
    config, run = prepared
    asked, clean, said = [], [], []
    monkeypatch.setattr(row_documents, "PIECE_ROWS", 2)
    monkeypatch.setattr(row_documents, "CompressDocuments", KeepDocuments)
    monkeypatch.setattr(row_documents, "run_pipeline", in_process)
    row_documents.compress_documents(config, run, "f", [("train", 0.5)], clean.append)
    wanted = read_manifest(run.documents)
    shutil.rmtree(run.documents)

    def broken(config, step, todo, *args, **options):
        asked.append(len(todo))
        in_process(config, step, todo[:2], *args, **options)
        if len(asked) == 1:
            raise KeyboardInterrupt
        in_process(config, step, todo[2:], *args, **options)

    monkeypatch.setattr(row_documents, "run_pipeline", broken)
    with pytest.raises(KeyboardInterrupt):
        row_documents.compress_documents(config, run, "f", [("train", 0.5)], lambda line: None)
    row_documents.compress_documents(config, run, "f", [("train", 0.5)], said.append)
    assert asked == [3, 1] and said == ["documents: 2 of 3 pieces were already there", *clean]
    assert run.read_rows("train", 0.5) == run.read_rows("train")
    assert "achieved 1.00 (3 of 3 tokens of 3 documents of rows)" in clean[0] and read_manifest(run.documents) == wanted
    assert not list(run.root.glob(".documents-*"))


class KeepDocuments:
    """Leaves documents as they are."""

    def __init__(self, config, rates):
        pass

    def __call__(self, table, rows):
        texts = [row or [] for row in table["documents"].to_pylist()]
        counts = {name: [0 if name == "off" else len(row) for row in texts] for name in row_documents.COUNTS}
        columns = {"id": table["id"], "documents": texts, **counts}
        return {0.5: pa.table(columns, schema=row_documents.SCHEMA)}


def test_a_baseline_without_a_prompt_needs_no_documents(prepared):
    config, run = prepared
    plain = plain_finetuning_config(config)
    assert wanted_documents(plain) == [] and row_documents.has_documents(run, "f", wanted_documents(plain))
    assert wanted_documents(config), "the run itself does"
