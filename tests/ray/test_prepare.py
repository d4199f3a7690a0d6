"""Preparation on Ray Data: what it writes, what it refuses, and that a second or resumed run does no work twice."""

import json
import random

import pyarrow.parquet as pq
import pytest

from pi_ray.config import RunConfig
from pi_ray.data import find_neighbours, phase_dataset, pieces
from pi_ray.data.prepare import prepare
from pi_ray.errors import DataError, ModelError
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.retrieve.neighbours import normalised
from pi_ray.run import row_store
from pi_ray.run.artifact import digest_file, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.lock import LOCK
from pi_ray.run.phases import plain_finetuning_config

pytestmark = pytest.mark.ray
PASSAGE = (
    "The parcel shop opens at nine in the morning and closes late in the evening on every day of the week, as the sign "
    "on its door says to all who come by, and "
    "whoever has lost the slip of paper with the number can still ask for the parcel by name, as long as some card "
    "with a picture is shown to the people there."
)
TEMPLATE = (
    "# Instruction\n\nTranslate the request into one alert. Use the codes below.\n\n# Documents\n\n## Codes\n\n"
    "web: r9\ndb: k4\nmail: z1\nauth: q7\n"
)


def write_rows(path, split, count, seed):
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        service, value = rng.choice(["web", "db", "mail", "auth"]), rng.randrange(10, 99)
        row = {
            "id": f"{split}-{i}", "query": f"{split} {i}: alert when {service} is above {value}",
            "answer": f"from {service} | lat > {value}", "group": "g",
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return lines


@pytest.fixture
def config(tmp_path):
    for split, count, seed in (("train", 25, 0), ("dev", 6, 1), ("test", 7, 2)):
        write_rows(tmp_path / f"{split}.jsonl", split, count, seed)
    (tmp_path / "template.md").write_text(TEMPLATE)
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "run_dir": str(tmp_path / "run"),
            "prompt": {"chat": "chatml"},
            "compress": {"name": "none"},
            "task": {s: str(tmp_path / f"{s}.jsonl") for s in ("train", "dev", "test")}
            | {"template": str(tmp_path / "template.md")},
            "schedule": {"phases": 3, "shots": 2},
        }
    )


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, ray_local):
    monkeypatch.setattr(phase_dataset, "PIECE_ROWS", 10)


def run_quietly(config):
    said = []
    return prepare(config, said.append), said


def state(run):
    """Hash and time of every file under the run directory, but for its lock, which each run takes."""
    return {
        p.relative_to(run.root).as_posix(): (digest_file(p), p.stat().st_mtime_ns)
        for p in run.root.rglob("*")
        if p.is_file() and p != run.root / LOCK
    }


def test_every_artefact_is_written_and_a_second_run_touches_nothing(config):
    fingerprint, said = run_quietly(config)
    run = RunDir(config.root)
    assert said[0] == "rows: 25 train, 6 dev, 7 test, 0 rejected"
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    train = {r.id: r for r in run.read_rows("train")}
    templates = {t["rate"]: t for t in json.loads((run.templates / "templates.json").read_text())}
    # compressor "none" drops nothing, and says so
    assert set(templates) == {1.0, 0.5} and templates[0.5]["achieved"] == 1.0

    for name, rate, shots, rows in (("0", 1.0, 2, 25), ("1", 0.5, 1, 25), ("2", 0.0, 0, 25), ("dev", 0.0, 0, 6)):
        manifest = verify_artifact(run.phase(name))
        text = templates[rate]["text"] if rate else ""
        assert manifest["fingerprint"] == fingerprint and manifest["phase"] == {"rate": rate, "shots": shots}
        assert (
            manifest["template"] == text and manifest["prefix_ids"] == encoder.prefix(text) and manifest["rows"] == rows
        )
        assert len(manifest["files"]) == -(-rows // 10)

    table = pq.read_table(sorted(run.phase(0).glob("*.parquet"))).to_pylist()
    assert [r["id"] for r in table] == list(train)
    chosen = run.read_shots("train", train, 2)
    for row in table:
        assert row["prompt_ids"] == encoder.row(train[row["id"]].query, chosen[row["id"]])
        assert row["label_ids"] == encoder.answer(train[row["id"]].answer)
    assert verify_artifact(run.phase(0))["tokens"]["row_max"] == max(len(r["prompt_ids"]) for r in table)

    near = pq.read_table(run.neighbours).to_pylist()
    assert [r["id"] for r in near] == [
        f"{s}-{i}" for s, n in (("train", 25), ("dev", 6), ("test", 7)) for i in range(n)
    ]
    everything = {r.id: r for s in ("train", "dev", "test") for r in run.read_rows(s)}
    for row in near:
        assert len(row["neighbours"]) == 2 and set(row["neighbours"]) <= set(train) - {row["id"]}
        assert all(normalised(train[n].query) != normalised(everything[row["id"]].query) for n in row["neighbours"])

    before = state(run)
    assert run_quietly(config) == (fingerprint, ["prepare: nothing to do, the run directory is up to date"])
    assert run_quietly(config.replace(**{"schedule.epochs": 5, "serve.port": 9}))[1][0].startswith(
        "prepare: nothing to do"
    )
    assert state(run) == before


def test_a_killed_run_keeps_its_finished_pieces_and_ends_byte_identical(config):
    fingerprint, _ = run_quietly(config)
    run = RunDir(config.root)
    wanted = {p: digest for p, (digest, _) in state(run).items()}
    partial = run.phases / f".0-{fingerprint[:12]}.partial"
    run.phase(0).rename(partial)  # as a kill leaves it: no manifest, one file missing, one damaged, one half written
    (partial / "manifest.json").unlink()
    (partial / "part-00000.parquet").unlink()
    damaged = partial / "part-00001.parquet"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF
    damaged.write_bytes(content)
    (partial / ".part-00000.parquet.0123.tmp").write_bytes(b"half")
    (run.phases / ".1-000000000000.partial").mkdir()
    finished = (partial / "part-00002.parquet").stat().st_mtime_ns

    again, said = run_quietly(config)
    assert again == fingerprint and said[0] == "phases: 1 of 3 pieces were already there"
    assert (run.phase(0) / "part-00002.parquet").stat().st_mtime_ns == finished
    assert {p: digest for p, (digest, _) in state(run).items()} == wanted
    assert sorted(p.name for p in run.phases.iterdir()) == ["0", "1", "2", "dev"]


def test_documents_that_come_with_rows_are_compressed_by_actors_and_stand_in_each_phases_prompt(
    config, tmp_path, monkeypatch
):
    monkeypatch.setenv("PI_RAY_CACHE", "")  # the user's own cache folder, which holds the model
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        told = [{**r, "documents": [f"Page {i % 3}. {PASSAGE}"] if i % 2 else []} for i, r in enumerate(rows)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in told))
    config = config.replace(
        **{"compress.name": "none", "compress.documents": {"name": "llmlingua"}, "schedule.shots": 1}
    )
    said = run_quietly(config)[1]
    assert said[0].endswith("18 documents come with rows") and [
        s.split(" -> ")[0] for s in said if s.startswith("documents")
    ] == ["documents: rate 0.5"]
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    bank = {r.id: r for r in run.read_rows("train")}
    for phase, rate in enumerate((1.0, 0.5, 0.0)):
        shots, rows = (
            run.read_shots("train", bank, verify_artifact(run.phase(phase))["phase"]["shots"]),
            run.read_rows("train", rate),
        )
        made = pq.read_table(sorted(run.phase(phase).glob("*.parquet"))).to_pylist()
        assert [m["prompt_ids"] for m in made] == [encoder.row(r.query, shots.get(r.id, ()), r.documents) for r in rows]
        assert any(r.documents for r in rows) == (rate > 0)
    whole, half = (len(run.read_rows("train", rate)[1].documents[0]) for rate in (1.0, 0.5))
    assert 0.3 * whole < half < 0.75 * whole
    assert run_quietly(config)[1] == ["prepare: nothing to do, the run directory is up to date"]


def test_neighbours_of_a_killed_run_go_on_with_their_pieces(config, monkeypatch):
    monkeypatch.setattr(find_neighbours, "PIECE_ROWS", 10)
    fingerprint, _ = run_quietly(config)
    run = RunDir(config.root)
    wanted = digest_file(run.neighbours)
    # as a kill leaves it: no neighbours, the first two of five pieces
    folder = pieces.partial_folder(run.neighbours, f"2-{fingerprint}")  # two examples of each row
    for i in range(2):
        table = pq.read_table(run.neighbours).slice(10 * i, 10).replace_schema_metadata()
        row_store.write_piece(folder / f"train-{i:05d}.parquet", table)
    run.neighbours.unlink()
    said = run_quietly(config)[1]
    assert said[0] == "neighbours: 2 of 5 pieces were already there"
    assert digest_file(run.neighbours) == wanted and not list(run.root.glob(".neighbours*"))


def test_a_lost_or_damaged_neighbour_file_is_made_again(config):
    run_quietly(config)
    run = RunDir(config.root)
    wanted = digest_file(run.neighbours)
    run.neighbours.write_bytes(b"PAR1")
    assert any(line.startswith("neighbours: 2 for each of 38 rows") for line in run_quietly(config)[1])
    assert digest_file(run.neighbours) == wanted


def test_the_plain_baseline_needs_neither_neighbours_nor_compressed_templates(config):
    plain = plain_finetuning_config(config)
    _, said = run_quietly(plain)
    run = RunDir(plain.root)
    assert not run.neighbours.exists() and [
        t["rate"] for t in json.loads((run.templates / "templates.json").read_text())
    ] == [1.0]
    assert verify_artifact(run.phase(0))["phase"] == {"rate": 0.0, "shots": 0} and said[-1].startswith(
        "phase dev: rate 0, 0 shots, 6 rows, 3 + "
    )


def test_bad_rows_are_kept_aside_and_too_many_stop_the_run(config, tmp_path):
    with open(tmp_path / "train.jsonl", "a") as f:
        f.write('{"id": "x", "query": \n{"query": "no answer"}\n')
    with pytest.raises(DataError, match=r"2 bad rows, and task.max_bad_rows is 0:\n.*train\.jsonl:26: "):
        run_quietly(config)
    rejects = [json.loads(line) for line in RunDir(config.root).rejects.read_text().splitlines()]
    assert [r["line"] for r in rejects] == [26, 27] and all(r["reason"] for r in rejects)
    _, said = run_quietly(config.replace(**{"task.max_bad_rows": 2, "schedule.shots": 0}))
    assert said[0] == "rows: 25 train, 6 dev, 7 test, 2 rejected"


def test_a_train_query_that_stands_in_test_is_refused_or_dropped(config, tmp_path):
    leaked = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
    with open(tmp_path / "train.jsonl", "a") as f:
        f.write(json.dumps({"id": "leak", "query": f"  {leaked['query'].upper()} ", "answer": "a"}) + "\n")
    with pytest.raises(
        DataError, match=r"1 train queries also stand in dev or test.*\n  train row 'leak', also in test"
    ):
        run_quietly(config)
    _, said = run_quietly(config.replace(**{"task.overlap": "drop", "schedule.shots": 0}))
    assert (
        said[0]
        == "rows: 25 train, 6 dev, 7 test, 0 rejected; "
        "1 train rows dropped, because their queries also stand in dev or test"
    )
    assert "leak" not in {r.id for r in RunDir(config.root).read_rows("train")}


def test_ids_must_be_unique_over_the_splits_and_splits_not_empty(config, tmp_path):
    with open(tmp_path / "test.jsonl", "a") as f:
        f.write(json.dumps({"id": "train-3", "query": "another", "answer": "a"}) + "\n")
    with pytest.raises(DataError, match="'train-3'"):
        run_quietly(config)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="has no test rows"):
        run_quietly(config)


def test_without_dev_rows_the_last_train_rows_serve(config, tmp_path):
    (tmp_path / "dev.jsonl").unlink()
    _, said = run_quietly(config.replace(**{"schedule.shots": 0}))
    assert said[0] == "rows: 23 train, 2 dev, 7 test, 0 rejected; no dev rows: the last 2 train rows serve as dev"
    assert [r.id for r in RunDir(config.root).read_rows("dev")] == ["train-23", "train-24"]


def test_actors_compress_the_template_to_each_rate(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PI_RAY_CACHE", "")  # the user's own cache folder, which holds the model
    _, said = run_quietly(config.replace(**{"compress.name": "llmlingua", "schedule.shots": 0, "schedule.phases": 4}))
    assert [line.split(" -> ")[0] for line in said if line.startswith("templates")] == [
        "templates: rate 1", "templates: rate 0.6667", "templates: rate 0.3333",
    ]


def test_what_is_wrong_in_a_worker_is_said_in_one_sentence(config, tmp_path):
    with pytest.raises(ModelError, match=r"^/no/such/model: no such folder"):
        run_quietly(
            config.replace(**{"compress.name": "llmlingua", "compress.model": "/no/such/model", "schedule.shots": 0})
        )
    assert not RunDir(config.root).templates.exists()
